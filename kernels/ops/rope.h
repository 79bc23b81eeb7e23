// The rotation of one head and its table of cosines, shared by rope and rope_self_attention.
#pragma once

#include "core/tier.h"

#include <math.h>

namespace llaisys {

struct RopeTableArgs {
    const char *pos_ids; // int64, perhaps not aligned
    const float *powers; // [D / 2], theta^(2i/D)
    int64_t half;        // D / 2
    float *table;        // [T, 2, D / 2]: cosines, then sines, rounded to the dtype
    int32_t dtype;
};
using RopeTableFn = void(const RopeTableArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

// Sine and cosine in f64, straight line code that the compiler turns into vectors: reduction by multiples of pi / 2 in
// three parts of 33 bits (exact for |x| < 10^6, beyond that the library's functions are asked), polynomials on
// [-pi/4, pi/4] good to 2^-58. The result, rounded to f32, is the nearest f32 but for one case in about 10^8; an f32
// evaluation (half the time) was 1 ulp off in one case in four, and then differs from transformers' bits.
static inline void sin_cos(double x, float *sine, float *cosine) {
    const double magic = 6755399441055744.0; // 1.5 * 2^52: adding it leaves no bits for a fraction
    const double k = (x * 0.63661977236758134308 + magic) - magic;
    const double r =
        ((x - k * 1.57079632673412561417e+00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
    const double z = r * r;
    double s = 1.58969099521155010221e-10;
    s = -2.50507602534068634195e-08 + z * s;
    s = 2.75573137070700676789e-06 + z * s;
    s = -1.98412698298579493134e-04 + z * s;
    s = 8.33333333332248946124e-03 + z * s;
    s = -1.66666666666666324348e-01 + z * s;
    s = r + r * z * s;
    double c = -1.13596475577881948265e-11;
    c = 2.08757232129817482790e-09 + z * c;
    c = -2.75573143513906633035e-07 + z * c;
    c = 2.48015872894767294178e-05 + z * c;
    c = -1.38888888888741095749e-03 + z * c;
    c = 4.16666666666666019037e-02 + z * c;
    c = (1.0 - 0.5 * z) + z * z * c;
    const int32_t quadrant = (int32_t)k & 3;
    const double a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
    *sine = float(quadrant & 2 ? -a : a);
    *cosine = float((quadrant + 1) & 2 ? -b : b);
}

template <class T>
static inline void round_span(float *x, int64_t n) {
    int64_t i = 0;
    for (; i + Vec::N <= n; i += Vec::N) store(x + i, round_to<T>(load(x + i)));
    if (i < n) store(x + i, round_to<T>(load(x + i, n - i)), n - i);
}

// Positions [begin, end) of the table.
[[maybe_unused]] static void fill_rope_table(const RopeTableArgs &args, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        int64_t pos;
        memcpy(&pos, args.pos_ids + t * 8, 8);
        const float position = float(pos);
        float *cosine = args.table + 2 * t * args.half, *sine = cosine + args.half;
        float largest = 0;
        for (int64_t i = 0; i < args.half; ++i) {
            const float angle = position / args.powers[i];
            const float magnitude = angle < 0 ? -angle : angle;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest < 1e6f) {
            for (int64_t i = 0; i < args.half; ++i) sin_cos(double(position / args.powers[i]), sine + i, cosine + i);
        } else {
            for (int64_t i = 0; i < args.half; ++i) {
                sine[i] = float(::sin(double(position / args.powers[i])));
                cosine[i] = float(::cos(double(position / args.powers[i])));
            }
        }
        with_type(args.dtype, [&]<class T>(T) { round_span<T>(cosine, 2 * args.half); });
    }
}

template <class T>
static inline void rotate(T *out, const T *x, int64_t i, int64_t n, Vec cosine, Vec sine, int64_t half) {
    const bool whole = n == Vec::N;
    const Vec a = whole ? load(x + i) : load(x + i, n), b = whole ? load(x + half + i) : load(x + half + i, n);
    const Vec first = round_to<T>(a * cosine) - round_to<T>(b * sine);
    const Vec second = round_to<T>(b * cosine) + round_to<T>(a * sine);
    if (whole) {
        store(out + i, first);
        store(out + half + i, second);
    } else {
        store(out + i, first, n);
        store(out + half + i, second, n);
    }
}

// One head: out may be x.
template <class T>
static inline void rope_row(T *out, const T *x, const float *table, int64_t half) {
    int64_t i = 0;
    for (; i + Vec::N <= half; i += Vec::N) rotate(out, x, i, Vec::N, load(table + i), load(table + half + i), half);
    if (i < half) rotate(out, x, i, half - i, load(table + i, half - i), load(table + half + i, half - i), half);
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/tensor.h"
#include "core/threads.h"

#include <cmath>

namespace llaisys {

// The table for these positions, in the scratch memory of the calling thread (slot TABLE), filled by all threads.
const float *rope_table(const LlaisysTensor &pos_ids, int64_t head_dim, float theta, int32_t dtype);

void check_rope(const Argument &x, const Argument &pos_ids, float theta);

} // namespace llaisys
#endif
