"""The graph of Qwen2 as both backends run it: the nodes, their names, and which kernel computes which.

A node is one call of one operator. Its site is named after the module of transformers that does the same:
"model.layers.3.self_attn.q_proj"; `graph` lists all of them with their operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import errors
from ..errors import DTypeError, InvalidArgumentError, ShapeError
from ..reference import SPECS, Spec
from ..reference.binding import Problem, bind, describe

Array = npt.NDArray[Any]
#: What `kernels=` names: a built-in implementation, or a function with the signature of the operator's twin.
Kernel = Literal["native", "reference"] | Callable[..., Any]

_LAYER = {
    "input_layernorm": "add_rms_norm",
    "self_attn.q_proj": "linear",
    "self_attn.k_proj": "linear",
    "self_attn.v_proj": "linear",
    "self_attn.rope_k": "rope",
    "self_attn.attn": "rope_self_attention",
    "self_attn.o_proj": "linear",
    "post_attention_layernorm": "add_rms_norm",
    "mlp.gate_proj": "linear",
    "mlp.up_proj": "linear",
    "mlp.act": "swiglu",
    "mlp.down_proj": "linear",
}


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call of a forward pass, after it ran.

    `position` is that of the first row in the sequence. `inputs`, `outputs` and `scalars` are named as in the
    operator's SPEC; an absent bias is None. A prompt is run in chunks of at most 512 tokens, and long logits in several
    parts, so that a site can come several times in one pass.
    """

    site: str
    op: str
    position: int
    inputs: dict[str, Array | None]
    scalars: dict[str, float]
    outputs: dict[str, Array]

    @property
    def spec(self) -> Spec:
        """The SPEC of the operator."""
        return SPECS[self.op]

    def copy(self) -> Node:
        """The same node with arrays of its own."""
        return Node(
            self.site,
            self.op,
            self.position,
            {name: None if x is None else x.copy() for name, x in self.inputs.items()},
            dict(self.scalars),
            {name: x.copy() for name, x in self.outputs.items()},
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in self.outputs.items())
        return f"Node({self.site}: {self.op} at {self.position} -> {shapes})"


def graph(layers: int) -> dict[str, str]:
    """Site -> operator of every node of a model with that many layers, in the order in which they run."""
    sites = {"model.embed_tokens": "embedding"}
    for i in range(layers):
        sites |= {f"model.layers.{i}.{name}": op for name, op in _LAYER.items()}
        if i == 0:
            sites["model.layers.0.input_layernorm"] = "rms_norm"
    sites["model.norm"] = "add_rms_norm" if layers else "rms_norm"
    sites["lm_head"] = "linear"
    return sites


def select(label: str, patterns: Iterable[str], sites: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The sites that each pattern stands for.

    A pattern is the name of an operator, a site, or a glob over sites; the leading "model." of a site may be left out.
    InvalidArgumentError for one that stands for nothing.
    """
    return {pattern: _select(label, pattern, sites) for pattern in patterns}


def _select(label: str, pattern: str, sites: Mapping[str, str]) -> tuple[str, ...]:
    if not isinstance(pattern, str):
        raise InvalidArgumentError(f"{label}: expected a text, found {pattern!r}")
    if pattern in sites.values():
        return tuple(site for site, op in sites.items() if op == pattern)
    found = tuple(
        site for site in sites if fnmatchcase(site, pattern) or fnmatchcase(site.removeprefix("model."), pattern)
    )
    if found:
        return found
    operators = ", ".join(sorted(set(sites.values())))
    some = ", ".join(site for site in sites if not site.startswith("model.layers.") or ".layers.0." in site)
    raise InvalidArgumentError(
        f"{label}: {pattern!r} matches nothing; expected an operator ({operators}), a site ({some}, and alike for the "
        'other layers), or a pattern over sites such as "layers.3.*"'
    )


def choose_kernels(kernels: Mapping[str, Kernel] | None, sites: Mapping[str, str]) -> dict[str, Kernel]:
    """The kernel of each site that `kernels` names. A site goes before a glob, a glob before an operator; among
    several of one kind the last one counts."""
    kernels = dict(kernels or {})
    for key, kernel in kernels.items():
        if not callable(kernel) and kernel not in ("native", "reference"):
            raise InvalidArgumentError(
                f'kernels[{key!r}]: expected "native", "reference" or a function, found {kernel!r}'
            )
    selected = select("kernels", kernels, sites)

    def rank(key: str) -> int:
        if key in sites.values():
            return 0
        return 2 if key in sites or f"model.{key}" in sites else 1

    chosen: dict[str, Kernel] = {}
    for key in sorted(kernels, key=rank):  # sorted() keeps the order of equals
        chosen |= dict.fromkeys(selected[key], kernels[key])
    return chosen


def kernel_function(kernel: Kernel, op: str) -> Callable[..., Any]:
    """The function behind an entry of `kernels=`; one given by the caller is checked after each call."""
    if kernel == "reference":
        return SPECS[op].twin
    if kernel == "native":
        from .. import ops

        function: Callable[..., Any] = getattr(ops, op)
        return function
    return _Checked(kernel, SPECS[op])


class _Checked:
    """A kernel of the caller, of which the results must have the shapes and dtypes that the SPEC says.

    It may keep what it gets and what it gives: its inputs and results are copied, but for weights, which never change.
    """

    def __init__(self, kernel: Callable[..., Any], spec: Spec) -> None:
        self.kernel, self.spec = kernel, spec

    def __call__(self, *args: Any) -> Any:
        spec, count = self.spec, len(self.spec.inputs_args)
        inputs = {a.name: x for a, x in zip(spec.inputs_args, args[:count], strict=True)}
        scalars = {s.name: x for s, x in zip(spec.scalars, args[count:], strict=True)}
        own = (_own(name, x) for name, x in inputs.items())
        results = as_outputs(spec, self.kernel(*own, *scalars.values()))
        metas = {name: None if x is None else describe(x) for name, x in (inputs | results).items()}
        bound = bind(spec, metas, scalars)
        if isinstance(bound, Problem):
            raise getattr(errors, _STATUS_ERRORS[bound.status])(f"kernel of {bound.message}")
        arrays = tuple(np.array(x, order="C") for x in results.values())
        return arrays if len(arrays) > 1 else arrays[0]


def _own(name: str, x: Array | None) -> Array | None:
    if x is None or name not in ("weight", "bias"):
        return None if x is None else x.copy()
    weight = x.view()
    weight.flags.writeable = False
    return weight


_STATUS_ERRORS = {"SHAPE": "ShapeError", "DTYPE": "DTypeError", "INVALID_ARGUMENT": "InvalidArgumentError"}


def as_outputs(spec: Spec, result: Any) -> dict[str, Array]:
    """What a kernel or a hook returned, by output name: an array, a tuple in the order of the SPEC, or a dict."""
    names = [arg.name for arg in spec.outputs]
    if isinstance(result, Mapping):
        unknown = [name for name in result if name not in names]
        if unknown:
            raise InvalidArgumentError(f"{spec.name}: expected outputs {', '.join(names)}, found {unknown[0]!r}")
        return {name: np.asarray(x) for name, x in result.items()}
    values = result if isinstance(result, tuple) else (result,)
    if len(values) != len(names):
        raise InvalidArgumentError(
            f"{spec.name}: expected {len(names)} outputs ({', '.join(names)}), found {len(values)}"
        )
    return {name: np.asarray(x) for name, x in zip(names, values, strict=True)}


def overwrite(node: Node, result: Any) -> None:
    """Write what a hook returned over the outputs of a node, rounded to their dtype."""
    for name, value in as_outputs(node.spec, result).items():
        out = node.outputs[name]
        if value.shape != out.shape:
            raise ShapeError(f"{node.site}: {name}: expected shape {list(out.shape)}, found {list(value.shape)}")
        if value.dtype.kind in "OSUVMm" and value.dtype != out.dtype:
            raise DTypeError(f"{node.site}: {name}: expected numbers, found {value.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = value.astype(out.dtype)
