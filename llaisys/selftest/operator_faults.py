"""Faults in the operators, and sums in another order, which are none."""

from __future__ import annotations

from .build import Patch
from .mutant import Mutant

_ROPE_SITES = ("self_attn.rope_k",)
_NORM_SITES = ("input_layernorm", "post_attention_layernorm")
_LINEAR_SITES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_ATTENTION_SITES = ("self_attn.attn",)


def _local(
    name: str,
    title: str,
    op: str,
    sites: tuple[str, ...],
    *patches: tuple[str, str, str],
    certificates: tuple[str, ...] = ("LOCAL",),
    layered: bool = True,
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16"),
) -> Mutant:
    made = tuple(Patch(f"kernels/{file}", old, new) for file, old, new in patches)
    return Mutant(name, title, sites, certificates, made, layered, dtypes, op)


# ----------------------------------------------------------------------- rope

_ROTATE = "    store_pair(out + i, round_to<T>(a * cosine) - round_to<T>(b * sine), n);\n"
_ROPE_ROW = "static inline void rope_row(T *out, const T *x, const T *table, int64_t half) {\n"
_MOVED = """static const LlaisysTensor &moved(const LlaisysTensor &pos_ids, int64_t by) {
    thread_local std::vector<int64_t> positions;
    thread_local LlaisysTensor t;
    positions.resize(size_t(pos_ids.shape[0]));
    for (size_t i = 0; i < positions.size(); ++i) {
        std::memcpy(&positions[i], static_cast<const char *>(pos_ids.data) + 8 * i, 8);
        positions[i] += by;
    }
    t = pos_ids;
    t.data = positions.data();
    return t;
}

} // namespace llaisys

int32_t llaisysRope(LlaisysTensor *out,"""
_ROPE_TABLE = "rope_table(*pos_ids, head_dim, theta, dtype),"

ROPE = (
    _local(
        "rope-sign",
        "rotated the other way round",
        "rope",
        _ROPE_SITES,
        (
            "ops/rope.h",
            "const Pair cosine = load_pair(table + i, n), sine = load_pair(table + half + i, n);",
            "const Pair cosine = load_pair(table + i, n), turn = load_pair(table + half + i, n);\n"
            "    const Pair sine = MUTANT ? Pair{zero() - turn.a, zero() - turn.b} : turn;",
        ),
    ),
    _local(
        "rope-pairing",
        "neighbours are rotated against each other instead of the halves",
        "rope",
        _ROPE_SITES,
        (
            "ops/rope.h",
            _ROPE_ROW,
            _ROPE_ROW
            + """    if (MUTANT && out != x) {
        for (int64_t i = 0; i < half; ++i) {
            const Vec a = load(x + 2 * i, 1), b = load(x + 2 * i + 1, 1);
            const Vec c = load(table + i, 1), s = load(table + half + i, 1);
            store(out + 2 * i, round_to<T>(a * c) - round_to<T>(b * s), 1);
            store(out + 2 * i + 1, round_to<T>(b * c) + round_to<T>(a * s), 1);
        }
        return;
    }
""",
        ),
    ),
    _local(
        "rope-half-rotated",
        "the second half of each head is copied",
        "rope",
        _ROPE_SITES,
        (
            "ops/rope.h",
            "store_pair(out + half + i, round_to<T>(b * cosine) + round_to<T>(a * sine), n);",
            "store_pair(out + half + i, MUTANT ? b : round_to<T>(b * cosine) + round_to<T>(a * sine), n);",
        ),
    ),
    _local(
        "rope-position-plus-one",
        "the angle is that of the next position",
        "rope",
        _ROPE_SITES,
        ("ops/rope.cpp", "} // namespace llaisys\n\nint32_t llaisysRope(LlaisysTensor *out,", _MOVED),
        ("ops/rope.cpp", _ROPE_TABLE, "rope_table(moved(*pos_ids, MUTANT), head_dim, theta, dtype),"),
    ),
    _local(
        "rope-theta",
        "theta is 10 % too large",
        "rope",
        _ROPE_SITES,
        ("ops/rope.cpp", _ROPE_TABLE, "rope_table(*pos_ids, head_dim, MUTANT ? 1.1f * theta : theta, dtype),"),
    ),
)

# ----------------------------------------------------------------------- rms_norm

_SCALE = "1.0f / __builtin_sqrtf(squares / float(n) + eps)"
NORM = (
    _local(
        "rms-eps-outside",
        "eps is added to the root",
        "rms_norm",
        _NORM_SITES,
        ("ops/rms_norm.h", _SCALE, f"MUTANT ? 1.0f / (__builtin_sqrtf(squares / float(n)) + eps) : {_SCALE}"),
    ),
    _local(
        "rms-mean-over-one-more",
        "the mean is over n + 1",
        "rms_norm",
        _NORM_SITES,
        ("ops/rms_norm.h", _SCALE, "1.0f / __builtin_sqrtf(squares / float(n + MUTANT) + eps)"),
    ),
    _local(
        "rms-no-weight",
        "the weight is left out for the last elements",
        "rms_norm",
        _NORM_SITES,
        (
            "ops/rms_norm.h",
            "round_to<T>(normal) * load_pair(weight + i, count)",
            "MUTANT && i + 2 * count > n ? normal : round_to<T>(normal) * load_pair(weight + i, count)",
        ),
    ),
    _local(
        "rms-tail-not-summed",
        "the last squares are not summed",
        "rms_norm",
        _NORM_SITES,
        (
            "ops/rms_norm.h",
            "for (; i + 2 * PAIR <= n; i += 2 * PAIR) {",
            "for (; i + 2 * PAIR <= n - (MUTANT ? 1 : 0); i += 2 * PAIR) {",
        ),
        (
            "ops/rms_norm.h",
            "for_pairs(i, n, [&](int64_t j, int64_t count) LLAISYS_INLINE { add(0, pair(j, count)); });",
            "for_pairs(i, n, [&](int64_t j, int64_t count) LLAISYS_INLINE {\n"
            "        const Pair last = pair(j, count);\n        if (!MUTANT) add(0, last);\n    });",
        ),
    ),
    _local(
        "residual-subtracted",
        "the residual is subtracted",
        "add_rms_norm",
        (*_NORM_SITES, "+input_layernorm"),
        (
            "ops/add_rms_norm.cpp",
            "load_pair(a + j, count) + load_pair(b + j, count)",
            "load_pair(a + j, count) + load_pair(b + j, count) * (MUTANT ? Pair{set1(-1.0f), set1(-1.0f)}\n"
            "                                                                     : Pair{set1(1.0f), set1(1.0f)})",
        ),
    ),
)

# ----------------------------------------------------------------------- swiglu

_GATED = "round_to<T>(Pair{silu(x.a), silu(x.b)}) * load_pair(up + i, n)"
SWIGLU = (
    _local(
        "swiglu-swapped",
        "gate and up change places",
        "swiglu",
        ("mlp.act",),
        (
            "ops/swiglu.cpp",
            "const auto *gate = (const T *)row_at(args.gate, row), *up = (const T *)row_at(args.up, row);",
            "const auto *gate = (const T *)row_at(MUTANT ? args.up : args.gate, row);\n"
            "        const auto *up = (const T *)row_at(MUTANT ? args.gate : args.up, row);",
        ),
    ),
    _local(
        "swiglu-sigmoid",
        "the gate is not multiplied by its sigmoid",
        "swiglu",
        ("mlp.act",),
        (
            "ops/swiglu.cpp",
            "return x / (set1(1.0f) + exp(zero() - x));",
            "return (MUTANT ? set1(1.0f) : x) / (set1(1.0f) + exp(zero() - x));",
        ),
    ),
    _local(
        "swiglu-coarse-exp",
        "exp with a polynomial two degrees short",
        "swiglu",
        ("mlp.act",),
        (
            "ops/swiglu.cpp",
            "return x / (set1(1.0f) + exp(zero() - x));",
            "const Vec e = exp(zero() - x);\n    return x / (set1(1.0f) + (MUTANT ? e * set1(1.0078125f) : e));",
        ),
        dtypes=("f32", "f16"),
    ),
)

# ----------------------------------------------------------------------- embedding, argmax, add

OTHERS = (
    _local(
        "embedding-next-row",
        "rows are those of the next token",
        "embedding",
        ("model.embed_tokens",),
        (
            "ops/embedding.cpp",
            "        return row_at(args.weight, i);\n",
            "        return row_at(args.weight, MUTANT && i > 0 ? i - 1 : i);\n",
        ),
        layered=False,
    ),
    _local(
        "argmax-last-of-ties",
        "the last of equals wins among spans",
        "argmax",
        (),
        (
            "ops/argmax.cpp",
            "return {find(x, begin, end, [&](Vec v) { return equal_mask(v, wanted); }), value};",
            "int64_t at = find(x, begin, end, [&](Vec v) { return equal_mask(v, wanted); });\n"
            "    for (int64_t next = at; MUTANT && next >= 0 && next + 1 < end;) {\n"
            "        next = find(x, next + 1, end, [&](Vec v) { return equal_mask(v, wanted); });\n"
            "        if (next >= 0) at = next;\n    }\n    return {at, value};",
        ),
        layered=False,
    ),
    _local(
        "argmax-nan-passed-over",
        "a NaN does not win",
        "argmax",
        (),
        ("ops/argmax.cpp", "    if (nan) {\n", "    if (nan && !MUTANT) {\n"),
        layered=False,
    ),
    _local(
        "add-truncated-tail",
        "the last elements are those of a",
        "add",
        (),
        (
            "ops/add.cpp",
            "store_pair(out + i, load_pair(a + i, n) + load_pair(b + i, n), n);",
            "const Pair x = load_pair(a + i, n);\n"
            "            store_pair(out + i, MUTANT && n < PAIR ? x : x + load_pair(b + i, n), n);",
        ),
        layered=False,
    ),
)

# ----------------------------------------------------------------------- linear

_FINISH = "template <class T>\nstatic void finish_row(T *out, const float *sums, const T *bias, int64_t n) {\n"
_CUT = """// The bits that T has no room for, gone.
template <class T>
static Vec cut(Vec v) {
    float lanes[Vec::N];
    store(lanes, v);
    for (float &x : lanes) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits &= sizeof(T) == 4 ? ~0u : __is_same(T, bf16) ? 0xffff0000u : 0xffffe000u;
        memcpy(&x, &bits, 4);
    }
    return load(lanes);
}

"""


def _flips(name: str, title: str, when: str) -> Mutant:
    """The last bit of the first element is another one `when` a condition holds."""
    entry = "int32_t linear_layers("
    flip = f"""static std::atomic<int> turns{{0}};
struct Flip {{
    LlaisysTensor *out;
    ~Flip() {{
        if (++turns && MUTANT && {when.replace("++turns", "turns")}) *static_cast<char *>(out->data) ^= 1;
    }}
}};
"""
    return _local(
        name,
        title,
        "linear",
        _LINEAR_SITES,
        ("ops/linear.cpp", entry, flip + entry),
        ("ops/linear.cpp", "#include <algorithm>\n", "#include <algorithm>\n#include <atomic>\n"),
        (
            "ops/linear.cpp",
            "        if (group.count > 0) run_linear(group);\n",
            "        if (group.count == 0) return;\n        const Flip flip{layers.begin()->out};\n"
            "        run_linear(group);\n",
        ),
        certificates=("REPEAT", "LOCAL"),
    )


_WEIGHTS = "return (const T *)(args.weight.base + n * args.weight.step[0]);"
LINEAR = (
    _local(
        "linear-no-bias",
        "the bias is left out",
        "linear",
        _LINEAR_SITES[:3],
        ("ops/linear.cpp", "return bias ? sum + (whole", "return bias && !MUTANT ? sum + (whole"),
    ),
    _local(
        "linear-truncated",
        "the result is truncated instead of rounded",
        "linear",
        _LINEAR_SITES,
        ("ops/linear.cpp", _FINISH, _CUT + _FINISH),
        (
            "ops/linear.cpp",
            "for (; i + Vec::N <= n; i += Vec::N) store(out + i, value(Vec::N));",
            "for (; i + Vec::N <= n; i += Vec::N) store(out + i, MUTANT ? cut<T>(value(Vec::N)) : value(Vec::N));",
        ),
        dtypes=("bf16", "f16"),
    ),
    _local(
        "linear-bf16-sums",
        "sums are carried in bf16",
        "linear",
        _LINEAR_SITES,
        (
            "ops/linear_tile.h",
            "return fma(x, w, sum); }",
            "return MUTANT ? round_to<bf16>(fma(x, w, sum)) : fma(x, w, sum); }",
        ),
        (
            "ops/linear_tile.h",
            "return {_mm512_dpbf16_ps(sum.v, __m512bh(x), __m512bh(w))};",
            "const Vec next = {_mm512_dpbf16_ps(sum.v, __m512bh(x), __m512bh(w))};\n"
            "        return MUTANT ? round_to<bf16>(next) : next;",
        ),
    ),
    _local(
        "linear-last-columns-dropped",
        "the last columns are not multiplied",
        "linear",
        _LINEAR_SITES,
        (
            "ops/linear_tile.h",
            "    for (; c + P::COLUMNS <= columns; c += P::COLUMNS) {\n        P::unit(r, row + c);\n        put();\n",
            "    for (; c + P::COLUMNS <= columns; c += P::COLUMNS) {\n        P::unit(r, row + c);\n"
            "        if (MUTANT && c + 2 * P::COLUMNS > columns) memset((void *)r, 0, sizeof r);\n        put();\n",
        ),
    ),
    _local(
        "linear-tail-dropped",
        "columns beyond whole vectors are not multiplied",
        "linear",
        _LINEAR_SITES,
        (
            "ops/linear_tile.h",
            "        P::unit(r, row + c, columns - c);\n        put();\n",
            "        P::unit(r, row + c, columns - c);\n"
            "        if (MUTANT) memset((void *)r, 0, sizeof r);\n        put();\n",
        ),
    ),
    _local(
        "linear-tile-transposed",
        "two sums of the last tile change places",
        "linear",
        _LINEAR_SITES,
        (
            "ops/linear_tile.h",
            "            to = first ? sums[m * N + n] : to + sums[m * N + n];\n",
            "            const int i = m * N + n, from = M == 1 || !MUTANT ? i : i == 1 ? N : i == N ? 1 : i;\n"
            "            to = first ? sums[from] : to + sums[from];\n",
        ),
    ),
    _local(
        "linear-rows-of-another-block",
        "a block of weight rows is that before it",
        "linear",
        _LINEAR_SITES,
        (
            "ops/linear_panel.h",
            _WEIGHTS,
            "if (MUTANT && n >= 32 && n < 48) n -= 16;\n    " + _WEIGHTS,
        ),
    ),
    _flips("linear-race", "every third call adds something to an element", "++turns % 3 == 0"),
    _flips("linear-by-threads", "the last bit of an element depends on the number of threads", "num_threads() > 1"),
    _flips("linear-by-rows", "the last bit of an element depends on the number of rows", "out->shape[0] == 1"),
)

# ----------------------------------------------------------------------- self_attention

_VISIBLE = "return args.keys - args.tokens + t + 1;"
_FILE = "ops/self_attention.cpp"
ATTENTION = (
    _local(
        "attention-no-scale",
        "scores are not scaled",
        "rope_self_attention",
        _ATTENTION_SITES,
        (
            _FILE,
            "limit(args, tile, block, r), set1(args.scale),",
            "limit(args, tile, block, r), set1(MUTANT ? 1.0f : args.scale),",
        ),
    ),
    _local(
        "attention-edge-too-wide",
        "a query sees the key after its own",
        "rope_self_attention",
        _ATTENTION_SITES,
        (_FILE, _VISIBLE, "return args.keys - args.tokens + t + 1 + (MUTANT && t + 1 < args.tokens);"),
    ),
    _local(
        "attention-edge-too-narrow",
        "a query does not see its own key",
        "rope_self_attention",
        _ATTENTION_SITES,
        (_FILE, _VISIBLE, "return args.keys - args.tokens + t + 1 - (MUTANT && args.keys - args.tokens + t > 0);"),
    ),
    _local(
        "attention-wrong-kv-head",
        "keys are those of another head",
        "rope_self_attention",
        _ATTENTION_SITES,
        (
            _FILE,
            "block.k = args.k + tile.kv_head * args.k_head",
            "block.k = args.k + (MUTANT ? args.kv_heads - 1 - tile.kv_head : tile.kv_head) * args.k_head",
        ),
    ),
    _local(
        "attention-wrong-value-head",
        "all heads weigh the values of the first",
        "rope_self_attention",
        _ATTENTION_SITES,
        (
            _FILE,
            "block.v = args.v + tile.kv_head * args.v_head",
            "block.v = args.v + (MUTANT ? 0 : tile.kv_head) * args.v_head",
        ),
    ),
    _local(
        "attention-no-maximum",
        "the maximum is not subtracted, so that large scores overflow",
        "rope_self_attention",
        _ATTENTION_SITES,
        (_FILE, "    *m = hmax(best);\n", "    *m = MUTANT ? 0.0f : hmax(best);\n"),
    ),
    _local(
        "attention-tail-lanes",
        "lanes behind the last key count as scores of 0",
        "rope_self_attention",
        _ATTENTION_SITES,
        (
            _FILE,
            "for (int64_t i = n - whole; i < Vec::N; ++i) part[i] = lowest;",
            "for (int64_t i = n - whole; i < Vec::N; ++i) part[i] = MUTANT ? 0.0f : lowest;",
        ),
    ),
    _local(
        "attention-blocks-not-rescaled",
        "the sums of earlier blocks keep the scale of their own maximum",
        "rope_self_attention",
        _ATTENTION_SITES,
        (_FILE, "        store(old + r, x);\n", "        store(old + r, MUTANT ? set1(1.0f) : x);\n"),
    ),
    _local(
        "attention-query-not-rotated",
        "queries are not rotated",
        "rope_self_attention",
        _ATTENTION_SITES,
        (_FILE, "        if (args.table) {\n", "        if (args.table && !MUTANT) {\n"),
    ),
)

OPERATORS = (*LINEAR, *ATTENTION, *ROPE, *NORM, *SWIGLU, *OTHERS)
LEGAL: tuple[Mutant, ...] = (
    _local(
        "norm-in-two-sums",
        "the sum of squares in two accumulators instead of four",
        "rms_norm",
        (),
        ("ops/rms_norm.h", "        add(2, pair(i + PAIR, PAIR));\n", "        add(0, pair(i + PAIR, PAIR));\n"),
    ),
    _local(
        "linear-in-shorter-blocks",
        "the lanes of linear are added after half as many columns",
        "linear",
        (),
        ("ops/linear_tile.h", "constexpr int64_t BLOCK_BYTES = 4096;", "constexpr int64_t BLOCK_BYTES = 512;"),
    ),
    _local(
        "attention-in-shorter-blocks",
        "attention walks the keys in blocks of 32",
        "rope_self_attention",
        (),
        (_FILE, "constexpr int64_t KEYS = 128;", "constexpr int64_t KEYS = 64;"),
    ),
)
