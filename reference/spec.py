"""The declarative description of an operator.

Each module of `reference/ops` holds the numpy twin of one operator and one `SPEC`. The SPEC is the only place where the
operator is declared: the ctypes prototypes, the argument validation of the Python front end, the tests, the benchmarks
and the differ read it. The C entry `llaisys<Name>` takes the tensors in the order of `Spec.args`, then the scalars in
the order of `Spec.scalars`.

Shape letters: T tokens, S cached + new tokens, H query heads, K key/value heads, D head dim, E hidden (or row length),
F intermediate, N output features, C input features, V vocabulary. `...` stands for any leading axes, the same ones
wherever it appears in one SPEC; its size in `Dims` is a tuple of sizes, () for none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np

from .bounds import Array, Oracle

#: Size of each shape letter: an int, for "..." a tuple of ints.
Dims = Mapping[str, Any]

#: Storage dtypes of the operators, by the short names used everywhere (command line, tests, reports).
FLOATS: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
#: All element types that a tensor argument may have; those beyond FLOATS and i64 only where the SPEC says "any".
DTYPES: dict[str, np.dtype[Any]] = {
    **FLOATS,
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    **{f"i{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4)},
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "f64": np.dtype(np.float64),
    "c64": np.dtype(np.complex64),
    "c128": np.dtype(np.complex128),
}


@dataclass(frozen=True)
class Arg:
    """One tensor argument.

    `dtype` is "T" (the operator's storage dtype, the same for all its "T" arguments), a name of `DTYPES`, or "any" (any
    of `DTYPES`, the same for all "any" arguments). `strides` says what layouts the C entry takes: "rows" (last axis
    contiguous, the others free) or "any". `may_alias` names the inputs that this output may share its memory with,
    element for element. `or_one`: where the shape comes out as [], [1] is taken too.
    """

    name: str
    shape: str
    dtype: str = "T"
    role: Literal["in", "out"] = "in"
    optional: bool = False
    strides: Literal["rows", "any"] = "rows"
    may_alias: tuple[str, ...] = ()
    doc: str = ""
    or_one: bool = False


@dataclass(frozen=True)
class Scalar:
    """One scalar argument: `dtype` is "f32" or "i64"; without a default it must be given."""

    name: str
    dtype: Literal["f32", "i64"] = "f32"
    default: float | int | None = None
    doc: str = ""


@dataclass(frozen=True)
class Constraint:
    """What the sizes and scalars of a call must satisfy beyond the shapes of the arguments.

    `holds(dims, scalars)` is asked once all shapes fit; if not, the call is refused with `status`, naming `argument`.
    """

    argument: str
    text: str
    holds: Callable[[Dims, Mapping[str, float]], bool]
    status: str = "SHAPE"


@dataclass(frozen=True)
class ErrorCase:
    """A call that must be refused: `change` maps argument names to replaced arrays or values of a valid call.

    The dict that `change` gets holds the outputs too. `status` is the name of the C status without its prefix, for
    example "SHAPE" for LLAISYS_ERROR_SHAPE, and the message of the error must contain every string of `names`.
    """

    title: str
    status: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """A valid call with telling values (ties, NaN, infinities, heavy tails): a case whose inputs `change` replaces.

    `exact`: whatever f32 computes before the final rounding is exact, so that the result is y rounded, bit for bit.
    """

    title: str
    dims: Dims
    change: Callable[[dict[str, Any]], dict[str, Any]]
    exact: bool = False

    @property
    def label(self) -> str:
        """As `calls` names the case."""
        return self.title.replace(" ", "-")


@dataclass(frozen=True)
class Screen:
    """A first look at the one output of an operator whose oracle is expensive: most elements are seen to be within the
    bound, and the oracle is asked for the others only.

    `estimate(*inputs, *scalars)` is the value before the final rounding in f32, by a library that is trusted to be
    within half of `Oracle.a`, and a lower bound of `Oracle.a` (0 will do). `oracle(where, *inputs, *scalars)` is the
    oracle of the elements at `where`, index arrays as of `np.nonzero`, in one axis.
    """

    estimate: Callable[..., tuple[Array, Array | float]]
    oracle: Callable[..., Oracle]


@dataclass(frozen=True)
class BenchCase:
    """One benchmark shape; `phase` is "decode" or "prefill", `model` the size of the Qwen2 it is taken from."""

    title: str
    dims: Dims
    phase: Literal["decode", "prefill"]
    model: str


def random_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Standard normal values for every "T" input of `spec`; the default of `Spec.inputs`."""
    return {
        arg.name: rng.standard_normal(arg_shape(arg, dims), dtype=np.float32).astype(dtype)
        for arg in spec.inputs_args
        if arg.dtype == "T"
    }


@dataclass(frozen=True, repr=False)
class Spec:
    """One operator. See the module docstring for who reads it.

    `twin(*inputs, *scalars)` takes the inputs in the order of `args` (without the outputs) and returns the output, or a
    named tuple of the outputs in the order of `args`. `oracle` takes the same and returns one `Oracle` per output,
    computed in f64 by another formulation than the twin's; `screen` spares it work. `inputs(spec, rng, dims, dtype)`
    makes realistic inputs and scalars. `shared`: sizes of a call that several threads share. `large`: odd sizes beyond
    any block of rows, columns or terms that a kernel may work on at a time. `bytes(dims, itemsize)` replaces the
    default of `traffic`.
    """

    name: str
    summary: str
    formula: str
    source: str
    args: tuple[Arg, ...]
    twin: Callable[..., Any]
    oracle: Callable[..., tuple[Oracle, ...]]
    screen: Screen | None = None
    scalars: tuple[Scalar, ...] = ()
    accumulate: str = "f32"
    rounding: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    inputs: Callable[[Spec, np.random.Generator, Dims, np.dtype[Any]], dict[str, Any]] = random_inputs
    cases: tuple[Dims, ...] = ()
    probes: tuple[Probe, ...] = ()
    shared: Dims = field(default_factory=dict)
    large: tuple[Dims, ...] = ()
    errors: tuple[ErrorCase, ...] = ()
    bench: tuple[BenchCase, ...] = ()
    flops: Callable[[Dims], int] = field(default=lambda dims: 0)
    bytes: Callable[[Dims, int], int] | None = None
    raises: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Spec of {self.name}: {self.formula}>"

    @property
    def c_name(self) -> str:
        """Name of the C entry: `rms_norm` -> `llaisysRmsNorm`."""
        return "llaisys" + "".join(word.capitalize() for word in self.name.split("_"))

    @property
    def outputs(self) -> tuple[Arg, ...]:
        """The output tensors, in order."""
        return tuple(a for a in self.args if a.role == "out")

    @property
    def inputs_args(self) -> tuple[Arg, ...]:
        """The input tensors, in order."""
        return tuple(a for a in self.args if a.role == "in")

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtypes to try: FLOATS, or all of DTYPES if an argument takes "any"."""
        return DTYPES if any(a.dtype == "any" for a in self.args) else FLOATS

    @property
    def c_prototype(self) -> str:
        """The line that declares the C entry in `kernels/llaisys.h`."""
        types = {"f32": "float", "i64": "int64_t"}
        params = [f"{'' if a.role == 'out' else 'const '}LlaisysTensor *{a.name}" for a in self.args]
        params += [f"{types[s.dtype]} {s.name}" for s in self.scalars]
        return f"int32_t {self.c_name}({', '.join(params)});"

    def traffic(self, dims: Dims, itemsize: int) -> int:
        """Bytes that must cross memory once: all inputs read, all outputs written, unless `bytes` says otherwise."""
        if self.bytes is not None:
            return self.bytes(dims, itemsize)
        sizes = {"T": itemsize, "any": itemsize}
        return sum(
            int(np.prod(arg_shape(a, dims), dtype=np.int64)) * (sizes.get(a.dtype) or DTYPES[a.dtype].itemsize)
            for a in self.args
        )

    def call(self, function: Callable[..., Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
        """`function`, with the signature of the twin or oracle, on named inputs and scalars; always a tuple."""
        result = function(*(values.get(a.name) for a in self.inputs_args), *(values[s.name] for s in self.scalars))
        return result if isinstance(result, tuple) else (result,)


def arg_shape(arg: Arg, dims: Dims) -> tuple[int, ...]:
    """The shape of `arg` for the given sizes of the shape letters."""
    shape: list[int] = []
    for token in arg.shape.split():
        size = int(token) if token.isdigit() else dims[token]
        shape += [size] if isinstance(size, int) else size
    return tuple(shape)


def arg_dtype(arg: Arg, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of `arg` in a call of the operator with the storage dtype `dtype`."""
    return dtype if arg.dtype in ("T", "any") else DTYPES[arg.dtype]


def shape_letters(spec: Spec) -> tuple[str, ...]:
    """The symbolic letters of `spec`, in order of first appearance."""
    return tuple(dict.fromkeys(token for arg in spec.args for token in arg.shape.split() if not token.isdigit()))


def empty_outputs(spec: Spec, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Zero-filled arrays for the outputs of `spec`."""
    return {a.name: np.zeros(arg_shape(a, dims), arg_dtype(a, dtype)) for a in spec.outputs}


def dims_label(dims: Dims) -> str:
    """Short name of a case: "T3-H2-D64", with the leading axes as "2x3"."""
    values = ((k, "x".join(map(str, v)) or "0d") if isinstance(v, tuple) else (k, str(v)) for k, v in dims.items())
    return "-".join(f"{k.replace('...', 'rows')}{v}" for k, v in values)


def seeded_inputs(spec: Spec, dtype: str, label: str, dims: Dims) -> dict[str, Any]:
    """Inputs and scalars of a call by name, that depend on nothing but operator, label and dtype."""
    rng = np.random.default_rng(zlib.crc32(f"{spec.name}/{label}/{dtype}".encode()))
    values = spec.inputs(spec, rng, dims, spec.dtypes[dtype])
    return {name: np.asarray(x) if isinstance(x, np.generic) else x for name, x in values.items()}


def calls(spec: Spec, dtype: str) -> Iterator[tuple[str, Dims, dict[str, Any]]]:
    """All valid calls that every implementation must pass, as (label, dims, inputs and scalars by name).

    Each case comes once as it is and once without the optional inputs, then the probes. The values depend on nothing
    but operator, case and dtype.
    """

    optional = {a.name: None for a in spec.args if a.optional}
    for dims in spec.cases:
        values = seeded_inputs(spec, dtype, label := dims_label(dims), dims)
        yield label, dims, values
        if optional:
            yield f"{label}-without-{'-'.join(optional)}", dims, {**values, **optional}
    for probe in spec.probes:
        values = seeded_inputs(spec, dtype, label := probe.label, probe.dims)
        yield label, probe.dims, {**values, **probe.change(values)}


#: Sizes of the Qwen2 models that the benchmarks are about.
QWEN2_SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"E": 896, "H": 14, "K": 2, "D": 64, "F": 4864, "V": 151936},
    "1.5B": {"E": 1536, "H": 12, "K": 2, "D": 128, "F": 8960, "V": 151936},
}


def qwen2_bench(
    shapes: Callable[[dict[str, int]], Mapping[str, Dims]],
    more: tuple[tuple[Literal["decode", "prefill"], int, int], ...] = (),
) -> tuple[BenchCase, ...]:
    """Bench cases of both model sizes, decode (T = 1) and prefill (T = 512), each with S = 512.

    `shapes` maps the sizes to the dims of each use of the operator, by a short name of the use. `more` has further
    phases, T and S, for the larger model; the titles of these cases end with S.
    """
    phases: tuple[tuple[Literal["decode", "prefill"], int, int], ...] = (("decode", 1, 512), ("prefill", 512, 512))
    return tuple(
        BenchCase(f"{model} {use} {phase}{end}", dims, phase, model)
        for model, wanted, numbered in (*((model, phases, False) for model in QWEN2_SIZES), ("1.5B", more, True))
        for phase, tokens, keys in wanted
        for end in (f" {keys}" if numbered else "",)
        for use, dims in shapes({**QWEN2_SIZES[model], "T": tokens, "S": keys}).items()
    )
