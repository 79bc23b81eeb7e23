"""Taps, hooks and kernels: what a node shows, on both backends alike, and what takes its place."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import plain_weights, write_plain
from llaisys import ops, reference
from llaisys.errors import DTypeError, InterruptedCallError, InvalidArgumentError, ShapeError
from llaisys.models import Node, Qwen2
from llaisys.reference import SPECS

BACKENDS = ("native", "reference")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("small"), weights=plain_weights(seed=5))


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Qwen2]:
    return {backend: Qwen2(folder, backend=backend) for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, models: dict[str, Qwen2]) -> Qwen2:
    return models[request.param]


def same_bits(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def one(node: Any) -> Any:
    """The only output of a node."""
    (value,) = node.outputs.values()
    return value


def test_both_backends_show_the_same_graph(models: dict[str, Qwen2]) -> None:
    shown = {backend: model.run_with_cache(TOKENS)[1] for backend, model in models.items()}
    native, numpy = shown["native"], shown["reference"]
    assert list(native) == list(numpy) == list(models["native"].sites)
    for site, op in models["native"].sites.items():
        (a,), (b,) = native[site], numpy[site]
        assert a.site == b.site == site and a.op == b.op == op and a.position == b.position == 0
        assert a.scalars == b.scalars
        assert list(a.inputs) == list(b.inputs) == [arg.name for arg in SPECS[op].inputs_args]
        assert list(a.outputs) == list(b.outputs) == [arg.name for arg in SPECS[op].outputs]
        assert list(a.scalars) == [scalar.name for scalar in SPECS[op].scalars]
        for name in (*a.inputs, *a.outputs):
            x, y = ({**node.inputs, **node.outputs}[name] for node in (a, b))
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.shape == y.shape and x.dtype == y.dtype, (site, name)
                assert np.allclose(x.astype(np.float64), y.astype(np.float64), rtol=1e-3, atol=1e-3), (site, name)
    for node in (native, numpy):
        assert node["lm_head"][0].inputs["bias"] is None
        assert node["model.layers.0.self_attn.q_proj"][0].inputs["bias"] is not None
        assert node["model.layers.1.self_attn.attn"][0].scalars["scale"] == np.float32(1 / np.sqrt(8))


def test_a_node_is_a_call_of_its_operator(model: Qwen2) -> None:
    """The outputs are what the operator makes of the inputs, and every input is what its producer put out."""
    logits, nodes = model.run_with_cache(TOKENS)
    functions: Any = ops if model.backend == "native" else reference
    for shown in nodes.values():
        for node in shown:
            result = getattr(functions, node.op)(*node.inputs.values(), *node.scalars.values())
            for got, want in zip(
                result if isinstance(result, tuple) else (result,), node.outputs.values(), strict=True
            ):
                assert same_bits(np.asarray(got), want), node
    layer = {name.removeprefix("model.layers.1."): shown[0] for name, shown in nodes.items() if ".1." in name}
    normed = layer["input_layernorm"].outputs["out"]
    for name in "qkv":
        assert same_bits(layer[f"self_attn.{name}_proj"].inputs["x"], normed)
    attention = layer["self_attn.attn"].inputs
    assert same_bits(attention["k"], one(layer["self_attn.rope_k"]))
    assert same_bits(attention["v"].reshape(len(TOKENS), -1), one(layer["self_attn.v_proj"]))
    assert same_bits(layer["mlp.down_proj"].inputs["x"], one(layer["mlp.act"]))
    assert same_bits(layer["post_attention_layernorm"].inputs["a"], layer["input_layernorm"].outputs["sum"])
    assert same_bits(nodes["model.norm"][0].inputs["b"], one(layer["mlp.down_proj"]))
    assert same_bits(one(nodes["lm_head"][0]).astype(np.float32), logits)


def test_positions_over_calls_and_last_rows(model: Qwen2) -> None:
    seen: list[tuple[str, int, int]] = []
    with model.session() as session:
        session.tap(
            lambda node: seen.append((node.site, node.position, len(one(node)))), ["layers.0.mlp.act", "lm_head"]
        )
        session.forward(TOKENS, last=2)
        session.forward([1, 2])
    assert seen == [
        ("model.layers.0.mlp.act", 0, 8),
        ("lm_head", 6, 2),
        ("model.layers.0.mlp.act", 8, 2),
        ("lm_head", 8, 2),
    ]


def test_taps_change_nothing_and_can_be_removed(model: Qwen2) -> None:
    plain = model.logits(TOKENS)
    seen: list[Node] = []
    with model.session() as session:
        with session.tap(seen.append, "rope") as tap, session.tap(seen.append, "norm"):
            assert same_bits(session.forward(TOKENS), plain)
        tap.remove()
        count = len(seen)
        session.forward([1])
        assert len(seen) == count == 3
    assert [node.site for node in seen] == [
        "model.layers.0.self_attn.rope_k",
        "model.layers.1.self_attn.rope_k",
        "model.norm",
    ]
    assert "rope at 0 -> out float32[8, 2, 8]" in repr(seen[0])
    for node in seen:
        for array in node.outputs.values():
            array[...] = 0  # a copy
    assert same_bits(model.logits(TOKENS), plain)


def test_views_can_be_written_to(model: Qwen2) -> None:
    def silence(node: Node) -> None:
        assert node.inputs["x"] is not None and (model.backend == "reference" or not node.inputs["x"].flags.writeable)
        one(node)[...] = 0

    with model.session() as session, session.tap(silence, "lm_head", copy=False):
        assert not session.forward(TOKENS).any()


def test_what_a_callback_raises_reaches_the_caller(model: Qwen2) -> None:
    class Mine(Exception):
        pass

    def callback(node: Node) -> None:
        raise Mine(node.site)

    with model.session() as session:
        first = session.forward(TOKENS[:3])
        with (
            session.tap(callback, "layers.1.mlp.*"),
            pytest.raises(Mine, match=r"model\.layers\.1\.mlp\.gate_proj") as info,
        ):
            session.forward(TOKENS[3:])
        assert any(entry.name == "callback" for entry in info.traceback)
        assert not isinstance(info.value, InterruptedCallError)
        assert session.length == 3
        rest = session.forward(TOKENS[3:])
    assert np.allclose(np.concatenate([first, rest]), model.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_callbacks_make_and_remove_taps(model: Qwen2) -> None:
    """One-shot hooks; the pass goes on, and the next one runs without a tap."""
    plain = model.logits(TOKENS)
    seen: list[str] = []
    with model.session() as session:

        def once(node: Node) -> None:
            seen.append(node.site)
            tap.remove()
            other.remove()  # of the same node, and comes next

        tap = session.tap(once, "layers.?.mlp.act")
        other = session.tap(lambda node: seen.append("other"), "layers.?.mlp.act")
        assert same_bits(session.forward(TOKENS), plain)
        assert seen == ["model.layers.0.mlp.act"]

        def nested(node: Node) -> None:
            with session.tap(lambda inner: seen.append("within"), "*"):
                outer.remove()
            late.append(session.tap(lambda inner: seen.append(inner.site), ["layers.0.*", "lm_head"]))

        late: list[Any] = []
        outer = session.tap(nested, "layers.1.mlp.act")
        session.reset()
        assert same_bits(session.forward(TOKENS), plain)
        assert seen[1:] == ["lm_head"]
        late[0].remove()
        session.forward([1])
        assert len(seen) == 2
        if model.backend == "native":
            assert session._engine._tap is None  # type: ignore[attr-defined]


def test_a_tap_of_another_thread_goes_at_any_time(model: Qwen2) -> None:
    with model.session() as session:

        def remove() -> None:
            tap.remove()
            seen.append("removed")

        def remove_elsewhere(node: Node) -> None:
            seen.append(node.site)
            thread = threading.Thread(target=remove)
            thread.start()
            thread.join()

        seen: list[str] = []
        tap = session.tap(remove_elsewhere)
        session.forward(TOKENS)
        assert seen == ["model.embed_tokens", "removed"]


def test_hooks_replace_outputs(model: Qwen2) -> None:
    plain = model.logits(TOKENS)
    assert same_bits(model.run_with_hooks(TOKENS, {"*": lambda node: None}), plain)
    doubled = model.run_with_hooks(TOKENS, {"lm_head": lambda node: 2 * one(node)})
    assert same_bits(doubled, 2 * plain)
    # Without attention and mlp of both layers, only the embedding is left.
    none = model.run_with_hooks(TOKENS, [("*.o_proj", lambda n: 0 * one(n)), ("*.down_proj", lambda n: 0 * one(n))])
    weights = plain_weights(seed=5)
    h = weights["model.embed_tokens.weight"][TOKENS]
    x = reference.rms_norm(h, weights["model.norm.weight"], 1e-6)
    assert np.allclose(none, x @ weights["lm_head.weight"].T, rtol=1e-4, atol=1e-4)
    # One of two outputs by name, and both as a tuple; f64 is rounded to the storage type.
    by_name = model.run_with_hooks(TOKENS, {"model.norm": lambda n: {"out": n.outputs["out"].astype(np.float64) * 2}})
    both = model.run_with_hooks(TOKENS, {"model.norm": lambda n: (n.outputs["out"] * 2, n.outputs["sum"])})
    assert same_bits(by_name, both) and np.allclose(by_name, 2 * plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (np.zeros(3), ShapeError, r"lm_head: out: expected shape \[8, 67\], found \[3\]"),
        (np.full((8, 67), "x"), DTypeError, "numbers"),
        ({"oot": 1}, InvalidArgumentError, "expected outputs out, found 'oot'"),
        ((1, 2), InvalidArgumentError, "expected 1 outputs"),
    ],
)
def test_bad_replacements_are_refused(model: Qwen2, result: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        model.run_with_hooks(TOKENS, {"lm_head": lambda node: result})


def test_patterns(model: Qwen2) -> None:
    assert model.find_sites("rope") == ("model.layers.0.self_attn.rope_k", "model.layers.1.self_attn.rope_k")
    assert len(model.find_sites("layers.1.*")) == len(model.find_sites("model.layers.1.*")) == 12
    assert model.find_sites(["norm", "lm_head"]) == ("model.norm", "lm_head")
    for bad in ("layers.2.*", "ropes", "self_attention", ""):
        with pytest.raises(
            InvalidArgumentError, match=r"matches nothing; expected an operator \(add_rms_norm, embedding"
        ):
            model.run_with_cache(TOKENS, bad)
    logits, nodes = model.run_with_cache(TOKENS, ["*.attn"])
    assert list(nodes) == ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
    assert same_bits(logits, model.logits(TOKENS))


# ----------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_either_backend_from_the_kernels_of_the_other(folder: Path, dtype: str) -> None:
    native, numpy = (Qwen2(folder, backend=backend, dtype=dtype).logits(TOKENS) for backend in BACKENDS)
    assert same_bits(Qwen2(folder, dtype=dtype, kernels={"*": "reference"}).logits(TOKENS), numpy)
    assert same_bits(Qwen2(folder, dtype=dtype, kernels={"*": "native"}).logits(TOKENS), native)
    swapped = Qwen2(folder, backend="reference", dtype=dtype, kernels={"*": "native"})
    assert same_bits(swapped.logits(TOKENS), native)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_kernels(folder: Path, backend: str) -> None:
    calls: list[str] = []

    def kernel(name: str, op: str) -> Any:
        def function(*args: Any) -> Any:
            calls.append(name)
            return SPECS[op].twin(*args)

        return function

    model = Qwen2(
        folder,
        backend=backend,
        kernels={
            "model.layers.1.self_attn.rope_k": kernel("site", "rope"),
            "layers.?.self_attn.rope*": kernel("glob", "rope"),
            "rope": kernel("op", "rope"),
            "layers.1.post_attention_layernorm": kernel("norm", "add_rms_norm"),
        },
    )
    logits = model.logits(TOKENS)
    assert calls == ["glob", "site", "norm"]
    assert np.allclose(logits, Qwen2(folder, backend=backend).logits(TOKENS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_faulty_kernels_are_named(folder: Path, backend: str) -> None:
    def fails(*args: Any) -> Any:
        raise ZeroDivisionError("mine")

    for function, error, text in (
        (lambda x, pos, theta: x[:-1], ShapeError, "rope: out: expected shape"),
        (lambda x, pos, theta: x.astype(np.float64), DTypeError, "rope: out: expected f32, found f64"),
        (lambda x, pos, theta: (x, x), InvalidArgumentError, "expected 1 outputs"),
        (lambda x: x, TypeError, "positional argument"),
        (fails, ZeroDivisionError, "mine"),
    ):
        model = Qwen2(folder, backend=backend, kernels={"rope": function})
        with pytest.raises(error, match=text):
            model.logits(TOKENS)
    for kernels, text in (
        ({"rope": "numpy"}, 'expected "native", "reference" or a function'),
        ({"rop": "native"}, "kernels: 'rop' matches nothing"),
        ({3: "native"}, "expected a text"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            Qwen2(folder, backend=backend, kernels=kernels)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_kernels_may_keep_what_they_get(folder: Path, backend: str) -> None:
    """Inputs stay as they were in the call, also when the model is closed; only weights are not copied."""
    kept: list[tuple[Any, bytes]] = []

    def keep(*args: Any) -> Any:
        kept.extend((x, x.tobytes()) for x in args if isinstance(x, np.ndarray))
        return SPECS["linear"].twin(*args) if len(args) == 3 else SPECS["rope_self_attention"].twin(*args)

    with Qwen2(folder, backend=backend, kernels={"linear": keep, "rope_self_attention": keep}) as model:
        with model.session() as session:
            session.forward(TOKENS)
            session.truncate(2)
            session.forward([7, 7, 7])
        weight = next(x for x, _ in kept if x.shape == (67, 24))
        assert not weight.flags.writeable and np.array_equal(weight, plain_weights(seed=5)["lm_head.weight"])
    again = Qwen2(folder)  # where the memory of the other was
    again.logits(TOKENS)
    assert len(kept) > 50 and all(x.tobytes() == before for x, before in kept)


def test_weights_are_freed_with_the_last_array(folder: Path) -> None:
    kept: list[Any] = []

    def keep(x: Any, weight: Any, bias: Any) -> Any:
        kept.append(weight)
        return reference.linear(x, weight, bias)

    gc.collect()
    gc.disable()
    try:
        model = Qwen2(folder, kernels={"lm_head": keep})
        model.logits(TOKENS)
        lease = weakref.ref(kept[0].base.base.owner)  # beneath two arrays
        model.close()
        assert lease() is not None
        kept.clear()
        assert lease() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_kernels_may_reuse_their_outputs(folder: Path, backend: str) -> None:
    kernel, buffer = SPECS["add_rms_norm"].twin, np.empty((2, len(TOKENS), 24), np.float32)

    def reuse(*args: Any) -> Any:
        buffer[0], buffer[1] = kernel(*args)
        return buffer[0], buffer[1]

    found, expected = (
        Qwen2(folder, backend=backend, kernels={"add_rms_norm": function}).logits(TOKENS)
        for function in (reuse, kernel)
    )
    assert same_bits(found, expected)
    before = buffer.tobytes()
    hook = {"norm": lambda node: (np.zeros_like(node.outputs["out"]), node.outputs["sum"])}
    model = Qwen2(folder, backend=backend, kernels={"model.norm": lambda *args: (buffer[0], buffer[1])})
    assert not model.run_with_hooks(TOKENS, hook).any() and buffer.tobytes() == before


def test_a_wrong_kernel_shows(folder: Path) -> None:
    plain = Qwen2(folder).logits(TOKENS)

    def late(x: Any, pos_ids: Any, theta: float) -> Any:
        return reference.rope(x, pos_ids + 1, theta)

    assert np.abs(Qwen2(folder, kernels={"layers.1.self_attn.rope_k": late}).logits(TOKENS) - plain).max() > 1e-2
