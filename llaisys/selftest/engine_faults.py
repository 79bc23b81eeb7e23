"""Faults in the engine: right operators, called wrongly."""

from __future__ import annotations

from ..diff.ledger import UNTAPPED
from .build import Patch
from .mutant import Mutant

_ENGINE = "kernels/models/qwen2.cpp"


def _engine(old: str, new: str) -> tuple[Patch, ...]:
    return (Patch(_ENGINE, old, new),)


#: The end of the gate in the loop over the layers; what follows it is the body.
_LOOP = "llaisysMutantLayer == int(i);\n"

ENGINE = (
    Mutant(
        "swapped-arguments",
        "gate and up change places in the call of swiglu",
        ("mlp.act",),
        ("EDGE",),
        _engine(
            '        run(llaisysSwiglu(&act, &gate, &up), "mlp.act", "swiglu", {&act, &gate, &up});\n',
            "        const LlaisysTensor &first = MUTANT ? up : gate, &second = MUTANT ? gate : up;\n"
            '        run(llaisysSwiglu(&act, &first, &second), "mlp.act", "swiglu", {&act, &first, &second});\n',
        ),
    ),
    Mutant(
        "keys-to-another-layer",
        "new keys are written to the cache of the next layer",
        ("self_attn.attn",),
        ("STATE",),
        _engine(
            "LlaisysTensor new_k = cached(cache.k, position, S)",
            "LlaisysTensor new_k = cached(MUTANT ? caches_[(i + 1) % caches_.size()].k : cache.k, position, S)",
        ),
    ),
    Mutant(
        "values-to-another-layer",
        "new values are written to the cache of the layer before",
        ("self_attn.attn",),
        ("STATE",),
        _engine(
            "new_v = cached(cache.v, position, S);",
            "new_v = cached(MUTANT ? caches_[(i + caches_.size() - 1) % caches_.size()].v : cache.v, position, S);",
        ),
    ),
    Mutant(
        "other-eps",
        "eps is 16 times too large",
        ("input_layernorm", "post_attention_layernorm"),
        ("PARAM",),
        _engine(_LOOP, _LOOP + "        const float eps = MUTANT ? 16 * m.epsilon : m.epsilon;\n"),
    ),
    Mutant(
        "other-theta",
        "theta is that of another model",
        ("self_attn.rope_k",),
        ("PARAM",),
        _engine(_LOOP, _LOOP + "        const float theta = MUTANT ? 7 * m.theta : m.theta;\n"),
    ),
    Mutant(
        "other-scale",
        "scores are scaled by 1/d instead of 1/sqrt(d)",
        ("self_attn.attn",),
        ("PARAM",),
        _engine(
            _LOOP,
            _LOOP + "        const float scale = float(MUTANT ? 1.0 / double(dim) : 1.0 / std::sqrt(double(dim)));\n",
        ),
    ),
    Mutant(
        "positions-plus-one",
        "positions count from 1",
        ("self_attn.rope_k",),
        ("PARAM",),
        _engine(
            _LOOP,
            _LOOP + "        std::vector<int64_t> moved(positions);\n"
            "        for (int64_t &p : moved) p += MUTANT;\n"
            "        const LlaisysTensor pos = view(moved.data(), LLAISYS_DTYPE_I64, {T});\n",
        ),
    ),
    Mutant(
        "no-bias",
        "the biases of q, k and v are left out",
        ("self_attn.q_proj",),
        ("PARAM",),
        _engine(
            "return {&out, &weight.tensor, bias ? bias->get() : nullptr};",
            "return {&out, &weight.tensor, bias && !MUTANT ? bias->get() : nullptr};",
        ),
    ),
    Mutant(
        "weights-of-another-layer",
        "o_proj multiplies by the weight of the next layer",
        ("self_attn.o_proj",),
        ("PARAM",),
        _engine(
            'Linear{"self_attn.o_proj", o, w.o}',
            'Linear{"self_attn.o_proj", o, MUTANT ? model_.layers[(i + 1) % model_.layers.size()].o : w.o}',
        ),
    ),
    Mutant(
        "residual-not-kept",
        "the next residual add starts from the sum before the last",
        ("post_attention_layernorm", "+input_layernorm"),
        ("EDGE",),
        _engine("            std::swap(h, next);\n", "            if (!MUTANT) std::swap(h, next);\n"),
    ),
    Mutant(
        "one-key-too-few",
        "decode does not see the last key",
        ("self_attn.attn",),
        ("STATE",),
        _engine(
            "const LlaisysTensor all_k = cached(cache.k, 0, S), all_v = cached(cache.v, 0, S);",
            "const int64_t seen = MUTANT && S > T ? S - 1 : S;\n"
            "        const LlaisysTensor all_k = cached(cache.k, 0, seen), all_v = cached(cache.v, 0, seen);",
        ),
    ),
    Mutant(
        "keys-moved-by-one",
        "decode reads keys from the second on",
        ("self_attn.attn",),
        ("STATE",),
        _engine(
            "const LlaisysTensor all_k = cached(cache.k, 0, S), ",
            "const int64_t moved_by = MUTANT && S > T && S < capacity_;\n"
            "        const LlaisysTensor all_k = cached(cache.k, moved_by, S + moved_by), ",
        ),
    ),
    Mutant(
        "reset-without-effect",
        "reset keeps the sequence before",
        ("model.embed_tokens", "self_attn.attn", "self_attn.rope_k"),
        ("STATE", "PARAM"),
        _engine("    length_ = length;\n", "    length_ = length == 0 ? length_ : length;\n"),
        layered=False,
    ),
    Mutant(
        "prefix-one-too-many",
        "prefix reuse keeps one token that differs",
        ("model.embed_tokens", "self_attn.attn", "self_attn.rope_k"),
        ("STATE", "REPEAT"),
        (
            Patch(
                "kernels/models/qwen2_api.cpp",
                "const size_t kept = std::min(shared, count - 1);",
                "const size_t kept = std::min({shared + 1, known.size(), count - 1});",
            ),
        ),
        layered=False,
    ),
    Mutant(
        "layers-together",
        "the last feature of the second of several layers in one call is lost",
        (UNTAPPED,),
        ("REPEAT",),
        (
            Patch(
                "kernels/ops/linear.cpp",
                "        if (group.count > 0) run_linear(group);\n",
                "        if (group.count > 0) run_linear(group);\n"
                "        for (int64_t row = 0; MUTANT && group.count > 1 && row < x->shape[0]; ++row) {\n"
                "            const LlaisysTensor &t = *layers.begin()[1].out;\n"
                "            const int64_t size = dtype_size(t.dtype), last = row * t.strides[0] + t.shape[1] - 1;\n"
                "            std::fill_n(static_cast<char *>(t.data) + last * size, size, char(0));\n"
                "        }\n",
            ),
        ),
    ),
    Mutant(
        "head-of-another-row",
        "the head gets the row before",
        ("model.norm",),
        ("EDGE",),
        _engine(
            "const LlaisysTensor last = rows(h, first, T), ",
            "const LlaisysTensor last = rows(h, first - (first > 0), T - (first > 0)), ",
        ),
        layered=False,
    ),
)
