"""The native engine through the C API: `llaisysQwen2Model*` and `llaisysQwen2Session*` of llaisys.h."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Generator, Mapping
from ctypes import byref, c_int32, c_size_t, c_void_p
from typing import Any

import numpy as np

from .._interop import address_of
from .._lib import (
    LlaisysNode,
    LlaisysQwen2Meta,
    LlaisysTensor,
    TapCallback,
    check_call,
    check_handle,
    library,
    num_threads,
)
from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..dtypes import DataType, DeviceType
from ..errors import InternalError, StateError
from ..reference import SPECS
from .loading import Progress, load_weights
from .nodes import Array, Kernel, Node, kernel_function, overwrite
from .session import Observer

# The second parameter of a tap, `user`, is not needed, and a generator's `send` takes one argument only; a callee that
# ignores a parameter is fine in every calling convention where the caller cleans up, which are all that are in use.
_OneArgument = ctypes.CFUNCTYPE(c_int32, c_void_p)
_NO_TAP = TapCallback()


class NativeModel:
    """Weights in the native engine. `kernels` names the sites whose output another function computes."""

    def __init__(self, config: Qwen2Config, dtype: DataType, kernels: Mapping[str, Kernel]) -> None:
        lib = library()
        meta = LlaisysQwen2Meta(
            dtype=dtype,
            nlayer=config.num_hidden_layers,
            hs=config.hidden_size,
            nh=config.num_attention_heads,
            nkvh=config.num_key_value_heads,
            dh=config.head_dim,
            di=config.intermediate_size,
            maxseq=config.max_position_embeddings,
            voc=config.vocab_size,
            epsilon=config.rms_norm_eps,
            theta=config.rope_theta,
            end_token=next(iter(config.eos_token_ids), -1),
        )
        self._vocab_size = config.vocab_size
        self._kernels = {site: kernel for site, kernel in kernels.items() if kernel != "native"}
        self._handle: int | None = check_handle(lib.llaisysQwen2ModelCreate(byref(meta), DeviceType.CPU, None, 0))
        self._finalizer = weakref.finalize(self, lib.llaisysQwen2ModelDestroy, self._handle)
        if not config.attention_bias:
            check_call(lib.llaisysQwen2ModelSetAttentionBias(self._handle, 0))

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Copy all weights into the engine, in its dtype."""
        load_weights(checkpoint, self._put, num_threads(), progress)

    def _put(self, name: str, shape: tuple[int, ...], first: int, rows: Array) -> None:
        dtype = DataType.of_numpy(rows.dtype) or DataType.INVALID
        sizes = (c_size_t * len(shape))(*shape)
        taken = library().llaisysQwen2ModelLoadRows(
            self._handle, name.encode(), address_of(rows), sizes, len(shape), dtype, first, first + len(rows)
        )
        if check_call(taken) != 1:
            raise InternalError(f"{name}: expected a weight that the engine knows, found none")

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the layers, over all sessions."""
        return check_call(library().llaisysQwen2ModelTokensComputed(self._handle))

    def session(self) -> NativeSession:
        """A KV cache of its own over the weights, which it keeps alive."""
        handle = check_handle(library().llaisysQwen2SessionCreate(self._handle))
        lease = _Lease(self._handle) if any(map(callable, self._kernels.values())) else None
        return NativeSession(handle, self._vocab_size, self._kernels, lease)

    def close(self) -> None:
        """Give up the weights; they are freed when the last session is gone too."""
        self._finalizer()


class _Lease:
    """Keeps the weights, by a session that nobody uses. Functions of the caller are given views of them, and may keep
    these for longer than the model."""

    def __init__(self, model: int | None) -> None:
        handle = check_handle(library().llaisysQwen2SessionCreate(model))
        weakref.finalize(self, library().llaisysQwen2SessionDestroy, handle)


class NativeSession:
    """A session of the C API."""

    def __init__(self, handle: int, vocab_size: int, kernels: Mapping[str, Kernel], lease: _Lease | None) -> None:
        self._handle = handle
        self._vocab_size = vocab_size
        self._finalizer = weakref.finalize(self, library().llaisysQwen2SessionDestroy, handle)
        self._kernels, self._lease = kernels, lease
        self._tap: _Tap | None = None
        self._callback: Any = None
        self.observe(None)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return check_call(library().llaisysQwen2SessionLength(self._handle))

    def forward(self, tokens: Array, nlogits: int) -> Array:
        """Append tokens; the logits of the last `nlogits`."""
        logits = np.empty((nlogits, self._vocab_size), np.float32)
        status = library().llaisysQwen2SessionForward(
            self._handle, address_of(tokens), len(tokens), address_of(logits), nlogits
        )
        if self._tap is not None:
            self._tap.reraise()
        check_call(status)
        return logits

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        check_call(library().llaisysQwen2SessionTruncate(self._handle, length))

    def observe(self, observer: Observer | None) -> None:
        """Show nodes to `observer`. Without one, and without foreign kernels, the engine runs without a tap."""
        tap = _Tap(self._kernels, observer, self._lease) if self._kernels or observer else None
        callback = tap.callback() if tap else None
        passed = TapCallback.from_buffer_copy(callback) if callback else _NO_TAP
        check_call(library().llaisysQwen2SessionSetTap(self._handle, passed, None))
        self._tap, self._callback = tap, callback  # only now: the engine may call the one before until it has this one

    def close(self) -> None:
        """Free the cache."""
        self._finalizer()
        self._lease = None


class _Tap:
    """What the C callback of a session does, and the exception that ended a pass.

    The callback is the `send` of a generator, for the reason that `_lib` has for its interrupt callback: a signal
    handler may raise as soon as Python code is entered, which in a function is before any `try`, and ctypes would drop
    that.
    """

    def __init__(self, kernels: Mapping[str, Kernel], observer: Observer | None, lease: _Lease | None) -> None:
        self._kernels, self._observer = kernels, observer
        # Weak, as a session that is closed keeps no weights.
        self._lease: Callable[[], _Lease | None] = (lambda: None) if lease is None else weakref.ref(lease)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._errors: list[BaseException] = []

    def callback(self) -> Any:
        """The function for C. It keeps this object, which must not keep it: a circle would have to be collected."""
        loop = _answers(self._show, self._errors)
        next(loop)
        return _OneArgument(loop.send)

    def reraise(self) -> None:
        """Raise what ended the pass, if anything did."""
        if self._errors:
            raise self._errors.pop()

    def _show(self, address: int) -> None:
        c_node = LlaisysNode.from_address(address)
        site, op = c_node.site.decode(), c_node.op.decode()
        kernel = self._kernels.get(site)
        if kernel is not None:
            node = self._node(c_node, site, op)
            function = self._functions.get(site)
            if function is None:
                function = self._functions[site] = kernel_function(kernel, op)
            overwrite(node, function(*node.inputs.values(), *node.scalars.values()))
        if self._observer is not None:
            self._observer(site, op, lambda: self._node(c_node, site, op))

    def _node(self, c_node: LlaisysNode, site: str, op: str) -> Node:
        return _make_node(c_node, site, op, self._lease())


def _answers(show: Callable[[int], None], errors: list[BaseException]) -> Generator[int, int, None]:
    """Shows what is sent; yields 0, or 1 after an exception, which goes to `errors`."""
    answer = 0
    while True:
        try:
            while True:
                address = yield answer
                answer = 0
                show(address)
        except GeneratorExit:
            return
        except BaseException as error:
            errors.append(error)
            answer = 1


def _make_node(node: LlaisysNode, site: str, op: str, owner: object) -> Node:
    """The node with views of the engine's memory, which keep `owner`; only the outputs can be written to."""
    if op not in SPECS:
        raise InternalError(f"{site}: expected an operator, found {op!r}")
    spec = SPECS[op]
    if node.nargs != len(spec.args) or node.nscalars != len(spec.scalars):
        raise InternalError(f"{site}: expected the arguments of {op}, found {node.nargs} and {node.nscalars} scalars")
    inputs: dict[str, Array | None] = {}
    outputs: dict[str, Array] = {}
    for i, arg in enumerate(spec.args):
        pointer = node.args[i]
        array = _view(pointer.contents, owner) if pointer else None
        if arg.role == "in":
            if array is not None:
                array.flags.writeable = False
            inputs[arg.name] = array
        elif array is not None:
            outputs[arg.name] = array
    scalars = {scalar.name: node.scalars[i] for i, scalar in enumerate(spec.scalars)}
    return Node(site, op, node.position, inputs, scalars, outputs)


def _view(tensor: LlaisysTensor, owner: object) -> Array:
    dtype = DataType(tensor.dtype).numpy
    shape = tuple(tensor.shape[: tensor.ndim])
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides[: tensor.ndim])
    if tensor.data is None or min(strides, default=0) < 0:
        raise StateError("expected a tensor of the engine, found one without memory or with negative strides")
    size = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * size).from_address(tensor.data)
    memory.owner = owner
    return np.ndarray(shape, dtype, memory, 0, strides)
