// Rotary position embedding: the halves of each head rotated against each other.
#include "rope.h"

#include <math.h>

namespace llaisys {

struct RopeArgs {
    char *out;
    const char *x;
    int64_t out_token, out_head, x_token, x_head; // strides in bytes
    int64_t heads, half;
    const void *table; // of rope_table
    int32_t dtype;
};
// Heads [begin, end), counted through all tokens.
using RopeFn = void(const RopeArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

// Half as many doubles as a Vec has lanes: the compiler's generic vectors, which every tier has instructions for.
constexpr int WIDE = Vec::N / 2;
typedef float Narrow __attribute__((vector_size(WIDE * 4)));
typedef double Wide __attribute__((vector_size(WIDE * 8)));
typedef int64_t Bits __attribute__((vector_size(WIDE * 8)));

// Sine and cosine in f64: reduction by multiples of pi / 2 in three parts of 33 bits (exact for |x| < 10^6, beyond that
// the library's functions are asked), polynomials on [-pi/4, pi/4] good to 2^-58. The result, rounded to f32, is the
// nearest f32 but for one case in about 10^8; an f32 evaluation was 1 ulp off in one case in four, and then differs
// from transformers' bits.
static inline void sin_cos(Wide x, Narrow *sine, Narrow *cosine) {
    const double magic = 6755399441055744.0; // 1.5 * 2^52: adding it leaves no bits for a fraction
    const Wide shifted = x * 0.63661977236758134308 + magic, k = shifted - magic;
    const Bits quadrant = (Bits)shifted; // the lowest bits are those of k
    const Wide r =
        ((x - k * 1.57079632673412561417e+00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
    const Wide z = r * r;
    Wide s = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10;
    s = 2.75573137070700676789e-06 + z * s;
    s = -1.98412698298579493134e-04 + z * s;
    s = 8.33333333332248946124e-03 + z * s;
    s = -1.66666666666666324348e-01 + z * s;
    s = r + r * z * s;
    Wide c = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11;
    c = -2.75573143513906633035e-07 + z * c;
    c = 2.48015872894767294178e-05 + z * c;
    c = -1.38888888888741095749e-03 + z * c;
    c = 4.16666666666666019037e-02 + z * c;
    c = (1.0 - 0.5 * z) + z * z * c;
    const Bits swap = -(quadrant & 1);
    const Bits a = (swap & (Bits)c) | (~swap & (Bits)s), b = (swap & (Bits)s) | (~swap & (Bits)c);
    *sine = __builtin_convertvector((Wide)(a ^ ((quadrant & 2) << 62)), Narrow);
    *cosine = __builtin_convertvector((Wide)(b ^ (((quadrant + 1) & 2) << 62)), Narrow);
}

// One position of the table.
template <class T>
static void fill_row(T *cosine, float position, const float *powers, int64_t half) {
    T *sine = cosine + half;
    for (int64_t i = 0; i < half; i += Vec::N) {
        const int64_t n = half - i < Vec::N ? half - i : Vec::N;
        float angle[Vec::N], sines[Vec::N], cosines[Vec::N];
        const Vec power = n == Vec::N ? load(powers + i) : load(powers + i, n);
        store(angle, set1(position) / power);
        float largest = 0;
        for (int64_t j = 0; j < n; ++j) {
            const float magnitude = angle[j] < 0 ? -angle[j] : angle[j];
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest < 1e6f) {
            for (int64_t j = n; j < Vec::N; ++j) angle[j] = 0;
            for (int part = 0; part < Vec::N; part += WIDE) {
                Narrow x, s, c;
                memcpy(&x, angle + part, sizeof x);
                sin_cos(__builtin_convertvector(x, Wide), &s, &c);
                memcpy(sines + part, &s, sizeof s);
                memcpy(cosines + part, &c, sizeof c);
            }
        } else {
            for (int64_t j = 0; j < n; ++j) {
                sines[j] = float(::sin(double(angle[j])));
                cosines[j] = float(::cos(double(angle[j])));
            }
        }
        store(cosine + i, load(cosines), n);
        store(sine + i, load(sines), n);
    }
}

RopeTableFn rope_table_fill;
void rope_table_fill(const RopeTableArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        for (int64_t t = begin; t < end; ++t) {
            int64_t pos;
            memcpy(&pos, args.pos_ids + t * 8, 8);
            fill_row((T *)args.table + 2 * t * args.half, float(pos), args.powers, args.half);
        }
    });
}

RopeFn rope;
void rope(const RopeArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t t = i / args.heads, h = i % args.heads;
            rope_row((T *)(args.out + t * args.out_token + h * args.out_head),
                     (const T *)(args.x + t * args.x_token + h * args.x_head),
                     (const T *)args.table + 2 * t * args.half, args.half);
        }
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace llaisys {

LLAISYS_KERNEL(rope, RopeFn);
LLAISYS_KERNEL(rope_table_fill, RopeTableFn);

// theta^(2i/D) with the exponent and the power rounded to f32, as torch does; pow takes as long as a whole head, so the
// last answer is kept. The angle is the position divided by it. transformers multiplies by the rounded inverse, which
// gives the same f32 in 73 % of the cases and its neighbour in the others; the course divides and asks for 1e-4 of the
// result at position 1023, which the multiplication misses in one element of a million.
static const std::vector<float> &powers(int64_t head_dim, float theta) {
    thread_local std::vector<float> values;
    thread_local int64_t known_dim = -1;
    thread_local float known_theta = 0;
    if (head_dim != known_dim || theta != known_theta) {
        known_dim = -1;
        values.resize(size_t(head_dim / 2));
        for (int64_t i = 0; i < head_dim / 2; ++i)
            values[size_t(i)] = float(std::pow(double(theta), double(float(2 * i) / float(head_dim))));
        known_dim = head_dim;
        known_theta = theta;
    }
    return values;
}

namespace {

struct RopeTable {
    std::vector<char> pos_ids;
    int64_t head_dim = -1;
    float theta = 0;
    int32_t dtype = 0;
    RopeTableFn *kernel = nullptr;
};
thread_local RopeTable last_table;

} // namespace

const void *rope_table(const LlaisysTensor &pos_ids, int64_t head_dim, float theta, int32_t dtype) {
    RopeTable &last = last_table;
    const auto kernel = rope_table_fill_kernel.get();
    const auto *positions = static_cast<const char *>(pos_ids.data);
    const int64_t tokens = pos_ids.shape[0], half = head_dim / 2;
    const size_t bytes = size_t(tokens) * sizeof(int64_t);
    // Nobody else uses this slot, so that what was written there stays.
    auto *table = static_cast<char *>(scratch(SLOT_TABLE, size_t(tokens * head_dim * dtype_size(dtype))));
    if (last.kernel == kernel && last.head_dim == head_dim && last.theta == theta && last.dtype == dtype &&
        last.pos_ids.size() == bytes && std::memcmp(last.pos_ids.data(), positions, bytes) == 0)
        return table;
    last.kernel = nullptr; // until it is complete: an interrupt may end the loop
    last.pos_ids.assign(positions, positions + bytes);
    const RopeTableArgs args{last.pos_ids.data(), powers(head_dim, theta).data(), half, table, dtype};
    const int64_t least = std::max<int64_t>(1, 2048 / std::max<int64_t>(half, 1));
    parallel_for(tokens, grain_for(tokens, least), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    last.head_dim = head_dim;
    last.theta = theta;
    last.dtype = dtype;
    last.kernel = kernel;
    return table;
}

void check_rope(const Argument &x, const Argument &pos_ids, float theta) {
    check_ndim(x, 3);
    if (x.tensor->shape[2] % 2 != 0)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected an even head dim, found shape %s", x.name,
             shape_text(*x.tensor).c_str());
    check_dtype(pos_ids, LLAISYS_DTYPE_I64);
    check_ndim(pos_ids, 1);
    check_size(pos_ids, 0, x.tensor->shape[0], "tokens");
    check_last_axis_contiguous({pos_ids});
    if (!(theta > 0.0f) || theta > 3.4e38f)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "theta: expected a finite number above 0, found %g", double(theta));
}

} // namespace llaisys

int32_t llaisysRope(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *pos_ids, float theta) {
    using namespace llaisys;
    return guarded("rope", [&] {
        const int32_t dtype = check_floats({{"x", x}, {"out", out}});
        check_rope({"x", x}, {"pos_ids", pos_ids}, theta);
        check_same_shape({"out", out}, {"x", x});
        check_last_axis_contiguous({{"out", out}, {"x", x}});
        check_output({"out", out}, {{"x", x}, {"pos_ids", pos_ids}}, {"x"});
        const int64_t size = dtype_size(dtype), heads = x->shape[1], head_dim = x->shape[2];
        if (numel(*x) == 0) return;
        const RopeArgs args{static_cast<char *>(out->data),
                            static_cast<const char *>(x->data),
                            out->strides[0] * size,
                            out->strides[1] * size,
                            x->strides[0] * size,
                            x->strides[1] * size,
                            heads,
                            head_dim / 2,
                            rope_table(*pos_ids, head_dim, theta, dtype),
                            dtype};
        const int64_t count = x->shape[0] * heads, least = std::max<int64_t>(1, 16384 / head_dim);
        parallel_for(count, grain_for(count, least),
                     [&, kernel = rope_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}
#endif
