// out = r(a + b), element by element.
#include "core/tier.h"

namespace llaisys {

struct AddArgs {
    Rows out, a, b;
    int32_t dtype;
};
// The elements [begin, end) of one row.
using AddFn = void(const AddArgs &, int64_t row, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

AddFn add;
void add(const AddArgs &args, int64_t row, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        auto *out = (T *)row_at(args.out, row);
        const auto *a = (const T *)row_at(args.a, row), *b = (const T *)row_at(args.b, row);
        const auto body = [&](int64_t i, int64_t n)
                              LLAISYS_INLINE { store_pair(out + i, load_pair(a + i, n) + load_pair(b + i, n), n); };
        // Up to a whole line of out first. Large arrays of the C library begin 16 bytes behind one, and if all stores
        // go across lines, 512 rows of f32 take 9 % longer.
        const int64_t lead = int64_t(-(uintptr_t)(out + begin) % 64 / sizeof(T)) % PAIR;
        const int64_t first = begin + lead < end ? begin + lead : end;
        if (begin < first) body(begin, first - begin);
        for_pairs(first, end, body);
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/elementwise.h"

namespace llaisys { LLAISYS_KERNEL(add, AddFn); }

int32_t llaisysAdd(LlaisysTensor *out, const LlaisysTensor *a, const LlaisysTensor *b) {
    using namespace llaisys;
    return guarded("add", [&] {
        AddArgs args;
        args.dtype = check_elementwise({"out", out}, {"a", a}, {"b", b}, {"a", "b"});
        Rows rows[3] = {};
        make_joint_rows({out, a, b}, rows);
        args.out = rows[0], args.a = rows[1], args.b = rows[2];
        for_each_span(args.out, 32768, [&, kernel = add_kernel.get()](int64_t row, int64_t begin, int64_t end) {
            kernel(args, row, begin, end);
        });
    });
}
#endif
