"""Propagated error, beside the certificates: the run against the reference backend and against transformers.

Both are given the tokens of the native run. What is compared is a sample of rows of each node, relative in the 2-norm.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import Qwen2Config
from ..models import Qwen2
from ..models.nodes import Node, graph
from ..models.reference import ReferenceModel
from ..models.session import Session
from ..reference.bounds import unit
from ..reference.spec import FLOATS
from .ledger import Array, Entry
from .report import Drift, Flip
from .wiring import KEYS

#: Rows of each node that are compared, the last ones of a step.
ROWS = 4
#: How many times its own size an estimated difference may be exceeded.
SAFETY = 4.0
#: Flips whose noise is estimated; what follows is taken to have the last one's.
_NOISES = 2


class Sample:
    """The last rows that every node of one step put out, of its first output."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, Array]] = {}

    def keep(self, site: str, position: int, out: Array) -> None:
        """Take the rows of a node; a later part of the same step goes on top."""
        rows = np.asarray(out).reshape(len(out), -1)
        before = self.rows.get(site)
        if before is not None and before[0] + len(before[1]) == position:
            position, rows = before[0], np.concatenate([before[1], rows[-ROWS:]])
        cut = max(0, len(rows) - ROWS)
        self.rows[site] = position + cut, rows[cut:].copy()


def relative(native: Array, other: Array) -> float:
    """|native - other| / |other| in the 2-norm; inf where one of them is not finite and they differ."""
    a, b = native.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b, equal_nan=True) else np.inf
    norm, error = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    return error / norm if norm else 0.0 if not error else np.inf


def _tail(position: int, rows: Array, other: tuple[int, Array] | None) -> float | None:
    """`relative` of the last rows that both have, None if they end at different positions."""
    if other is None or position + len(rows) != other[0] + len(other[1]) or rows.shape[1] != other[1].shape[1]:
        return None
    count = min(len(rows), len(other[1]))
    return relative(rows[-count:], other[1][-count:])


class Borrowed:
    """A reference model over weights that somebody else keeps, and that must live as long."""

    def __init__(self, config: Qwen2Config, dtype: str, weights: Mapping[str, Array]) -> None:
        self._config, self._model = config, ReferenceModel(config, FLOATS[dtype], {})
        for name, weight in weights.items():
            self._model.put(name, weight)

    def session(self) -> Session:
        """As `Qwen2.session`."""
        return Session(self._model.session(), self._config, graph(self._config.num_hidden_layers))

    def close(self) -> None:
        """As `Qwen2.close`."""
        self._model.close()


class Context:
    """Runs the reference backend, and transformers if asked to, one step behind the native run."""

    def __init__(
        self, path: str, config: Qwen2Config, dtype: str, weights: Mapping[str, Array] | None, oracle: str | None
    ) -> None:
        self.model: Qwen2 | Borrowed
        if weights is None:
            self.model = Qwen2(path, backend="reference", dtype=dtype)
        else:
            self.model = Borrowed(config, dtype, weights)
        self.session = self.model.session()
        self.hf = Transformers(path, dtype, config.num_hidden_layers) if oracle == "hf" else None
        self._path, self.dtype = path, dtype
        self.drift: list[Drift] = []
        self.flips: list[Flip] = []
        self._native = Sample()
        self._noise = 0.0

    def visit(self, entry: Entry) -> None:
        """A node of the native run."""
        name = next(iter(entry.spec.outputs)).name
        self._native.keep(entry.site, entry.position, entry.outputs[name])

    def step(self, step: int, tokens: Sequence[int], logits: Array, sequence: Sequence[int]) -> None:
        """The native run has finished a step; `sequence` is all of its tokens, and `logits` its last rows."""
        other = Sample()

        def tap(node: Node) -> None:
            out = node.outputs[node.spec.outputs[0].name]
            other.keep(node.site, node.position, out)

        with self.session.tap(tap, copy=False):
            reference = self.session.forward(tokens, last=len(logits))
        hf = self.hf.step(tokens) if self.hf is not None else {}
        for site, (position, rows) in self._native.rows.items():
            distances = [_tail(position, rows, found) for found in (other.rows.get(site), hf.get(site))]
            if any(distance is not None for distance in distances):
                self.drift.append(Drift(site, step, *distances))
        self._native = Sample()
        first = len(sequence) - len(logits)
        for row, (native, wanted) in enumerate(zip(logits.argmax(axis=-1), reference.argmax(axis=-1), strict=True)):
            if native != wanted:
                self._flip(step, first + row, int(native), int(wanted), reference[row], sequence)

    def _flip(self, step: int, position: int, native: int, wanted: int, logits: Array, tokens: Sequence[int]) -> None:
        margin = float(logits[wanted]) - float(logits[native])
        if len(self.flips) < _NOISES:
            self._noise = self._noise_at(position, logits, tokens)
        self.flips.append(Flip(step, position, native, wanted, margin, self._noise))

    def _noise_at(self, position: int, logits: Array, tokens: Sequence[int]) -> float:
        """By how much rounding to the storage type may move the difference of two logits of one position.

        Estimated without the native run: by how much the reference's own logits move between a 16-bit type and f32.
        Rounding acts in proportion to the unit roundoff, so that what f32 does follows from what bf16 does.
        """
        coarse, other = (self.dtype, "f32") if self.dtype != "f32" else ("bf16", "bf16")
        with Qwen2(self._path, backend="reference", dtype=other) as model, model.session() as session:
            moved = session.forward(tokens[: position + 1], last=1)[0].astype(np.float64) - logits
        size = float(np.sqrt(np.mean(moved**2)))
        return SAFETY * math.sqrt(2) * size * unit(FLOATS[self.dtype]) / unit(FLOATS[coarse])

    def close(self) -> None:
        """Free the models."""
        self.session.close()
        self.model.close()


class Transformers:
    """Qwen2ForCausalLM of transformers, of which hooks show what the modules named as our sites put out."""

    def __init__(self, path: str, dtype: str, layers: int) -> None:
        import torch
        from transformers import DynamicCache, Qwen2ForCausalLM
        from transformers.utils import logging

        from ..checkpoint import Checkpoint

        self._torch = torch
        kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        folder = Checkpoint.open(path).path
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # ours says what is being done
        try:
            self._model = Qwen2ForCausalLM.from_pretrained(
                str(folder), dtype=kinds[dtype], local_files_only=True, use_safetensors=True
            ).eval()
        finally:
            if shown:
                logging.enable_progress_bar()
        self._cache: Any = DynamicCache(config=self._model.config)
        arguments = inspect.signature(self._model.forward).parameters
        self._cached = "cache" if "cache" in arguments else "past_key_values"  # as older ones call it
        self._length = 0
        self._rows: dict[str, tuple[int, Array]] = {}
        modules: Mapping[str, Any] = dict(self._model.named_modules())
        names = ["model.embed_tokens", "model.norm", "lm_head"]
        for i in range(layers):
            layer = f"model.layers.{i}."
            names += [f"{layer}self_attn.{name}_proj" for name in "qkvo"]
            names += [layer + name for name in ("input_layernorm", "post_attention_layernorm")]
            names += [f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")]
            modules[f"{layer}self_attn.o_proj"].register_forward_pre_hook(self._before(f"{layer}self_attn.attn"))
            modules[f"{layer}mlp.down_proj"].register_forward_pre_hook(self._before(f"{layer}mlp.act"))
        for name in names:
            modules[name].register_forward_hook(self._after(name))
        self._layers = layers

    def step(self, tokens: Sequence[int]) -> dict[str, tuple[int, Array]]:
        """Site -> position and the last rows of what it put out."""
        self._rows = {}
        with self._torch.no_grad():
            ids = self._torch.tensor([list(tokens)])
            self._model(ids, use_cache=True, **{self._cached: self._cache})
        self._length += len(tokens)
        for i in range(self._layers):
            keys = self._cache.layers[i].keys[0].transpose(0, 1)  # [S, K, D]
            self._keep(f"model.layers.{i}.{KEYS}", keys[-min(ROWS, len(tokens)) :], self._length)
        return self._rows

    def _keep(self, site: str, rows: Any, end: int) -> None:
        rows = rows.reshape(rows.shape[0], -1)[-ROWS:].float().numpy()
        self._rows[site] = end - len(rows), rows

    def _after(self, site: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            self._keep(site, output[0], self._length + output.shape[1])

        return hook

    def _before(self, site: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            self._keep(site, inputs[0][0], self._length + inputs[0].shape[1])

        return hook
