"""The shared library: finding, checking and loading it, its prototypes, its errors, threads, tiers, and Ctrl-C.

Nothing is loaded before the first use (`library()`), so that `import llaisys` is quick and works with a broken library.
The prototypes of the operators come from the SPECs of `llaisys.reference`; those of the other functions stand here.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import operator
import os
import re
import threading
from collections.abc import Generator
from contextlib import ExitStack
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

from . import _build
from .errors import InternalError, InvalidArgumentError, LibraryError, status_error

if TYPE_CHECKING:
    from .reference.spec import Spec

MAX_DIMS = 8
#: Instruction set tiers, lowest first.
TIERS = ("scalar", "avx2", "avx512", "amx")
#: Environment variable with the path of another library to use, for one built from changed kernels.
OVERRIDE = "LLAISYS_LIBRARY"
_FILE = "libllaisys.so"


class LlaisysTensor(ctypes.Structure):
    """A view of memory that the caller owns, strides in elements; the struct of the same name in llaisys.h."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    ]
    storage: object  #: set by `Tensor.lib_tensor`, to keep the memory alive


class LlaisysQwen2Meta(ctypes.Structure):
    """Sizes of a Qwen2 model; the struct of the same name in llaisys.h."""

    _fields_ = [
        ("dtype", c_int),
        *((name, c_size_t) for name in ("nlayer", "hs", "nh", "nkvh", "dh", "di", "maxseq", "voc")),
        ("epsilon", c_float),
        ("theta", c_float),
        ("end_token", c_int64),
    ]


class LlaisysNode(ctypes.Structure):
    """What a tap sees of one operator call; the struct of the same name in llaisys.h."""

    _fields_ = [
        ("site", c_char_p),
        ("op", c_char_p),
        ("position", c_int64),
        ("nargs", c_int32),
        ("nscalars", c_int32),
        ("args", POINTER(POINTER(LlaisysTensor))),
        ("scalars", POINTER(c_double)),
    ]


#: LlaisysInterrupt and LlaisysTap: a nonzero result ends the call with INTERRUPTED.
InterruptCallback = CFUNCTYPE(c_int32, c_void_p)
PartCallback = CFUNCTYPE(None, c_void_p, c_int64, c_int64)
TapCallback = CFUNCTYPE(c_int32, POINTER(LlaisysNode), c_void_p)

#: Result and parameters of every function that is no operator. Handles are void pointers.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llaisysAbiVersion": (c_int32, ()),
    "llaisysVersion": (c_char_p, ()),
    "llaisysBuildHash": (c_char_p, ()),
    "llaisysLastError": (c_char_p, ()),
    "llaisysLastStatus": (c_int32, ()),
    "llaisysStatusName": (c_char_p, (c_int32,)),
    "llaisysSetIsa": (c_int32, (c_char_p,)),
    "llaisysIsa": (c_char_p, ()),
    "llaisysHasIsa": (c_int32, (c_char_p,)),
    "llaisysSetNumThreads": (c_int32, (c_int32,)),
    "llaisysNumThreads": (c_int32, ()),
    "llaisysParallelFor": (c_int32, (c_int64, c_int64, PartCallback, c_void_p)),
    "llaisysMeasureRoof": (c_int32, (c_char_p, c_double, POINTER(c_double))),
    "llaisysSetInterrupt": (c_int32, (InterruptCallback, c_void_p)),
    "llaisysQwen2ModelCreate": (c_void_p, (POINTER(LlaisysQwen2Meta), c_int, POINTER(c_int), c_int)),
    "llaisysQwen2ModelDestroy": (c_int32, (c_void_p,)),
    "llaisysQwen2ModelLoadTensor": (c_int32, (c_void_p, c_char_p, c_void_p, POINTER(c_size_t), c_size_t, c_int)),
    "llaisysQwen2ModelLoadRows": (
        c_int32,
        (c_void_p, c_char_p, c_void_p, POINTER(c_size_t), c_size_t, c_int, c_size_t, c_size_t),
    ),
    "llaisysQwen2ModelSetAttentionBias": (c_int32, (c_void_p, c_int32)),
    "llaisysQwen2ModelReset": (c_int32, (c_void_p,)),
    "llaisysQwen2ModelInfer": (c_int64, (c_void_p, POINTER(c_int64), c_size_t)),
    "llaisysQwen2ModelTokensComputed": (c_int64, (c_void_p,)),
    "llaisysQwen2SessionCreate": (c_void_p, (c_void_p,)),
    "llaisysQwen2SessionDestroy": (c_int32, (c_void_p,)),
    # Arrays by address: making a typed pointer takes longer than the rest of the call.
    "llaisysQwen2SessionForward": (c_int32, (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)),
    "llaisysQwen2SessionLength": (c_int64, (c_void_p,)),
    "llaisysQwen2SessionTruncate": (c_int32, (c_void_p, c_size_t)),
    "llaisysQwen2SessionSetTap": (c_int32, (c_void_p, TapCallback, c_void_p)),
}
_SCALARS = {"f32": c_float, "i64": c_int64}


@dataclass(frozen=True)
class LibraryInfo:
    """Which library is loaded. `stale` says that it was compiled from other sources than this package (an override)."""

    path: Path
    overridden: bool
    version: str
    build_hash: str
    package_hash: str
    abi: int

    @property
    def stale(self) -> bool:
        return self.build_hash != self.package_hash


_files = ExitStack()  # keeps a library that had to be unpacked from an archive
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_info: LibraryInfo | None = None


def library() -> ctypes.CDLL:
    """The loaded library, prototypes set. LibraryError if there is none, or one that is not of this package."""
    global _library, _info
    if _library is None:
        with _lock:
            if _library is None:
                lib, _info = _load()
                _watch_interrupts(lib)
                _library = lib
    if PENDING:
        register_interrupt()
    return _library


def library_info() -> LibraryInfo:
    """Path, version and hashes of the library; loads it."""
    library()
    assert _info is not None
    return _info


def library_path() -> tuple[Path, bool]:
    """Path of the library that would be loaded, and whether LLAISYS_LIBRARY names it; the file need not exist."""
    override = os.environ.get(OVERRIDE)
    if override:
        return Path(override).absolute(), True
    resource = importlib.resources.files(__package__).joinpath(_FILE)
    if isinstance(resource, Path):
        return resource, False
    if not resource.is_file():
        return Path(_FILE), False
    return _files.enter_context(importlib.resources.as_file(resource)), False


def header_folder() -> Path:
    """The folder of llaisys.h."""
    # In an editable installation the header lies elsewhere than the package, hence by its own name.
    return Path(str(importlib.resources.files(__package__).joinpath("include/llaisys.h"))).parent


def _load() -> tuple[ctypes.CDLL, LibraryInfo]:
    path, overridden = library_path()
    whose = f"the library that {OVERRIDE} names" if overridden else "the library of this package"
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise LibraryError(f"{whose} is missing: expected a file at {path}, found {found}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{whose} cannot be loaded: expected a shared library at {path}, found: {error}") from None
    abi = int(_function(lib, path, "llaisysAbiVersion", c_int32, ())())
    if abi != _build.ABI_VERSION:
        raise LibraryError(f"{whose} has another ABI: expected {_build.ABI_VERSION}, found {abi} in {path}")
    for name, (restype, argtypes) in _PROTOTYPES.items():
        _function(lib, path, name, restype, argtypes)
    info = LibraryInfo(
        path=path,
        overridden=overridden,
        version=lib.llaisysVersion().decode(),
        build_hash=lib.llaisysBuildHash().decode(),
        package_hash=_build.BUILD_HASH,
        abi=abi,
    )
    if info.stale and not overridden:
        raise LibraryError(
            f"{whose} is stale: expected build {info.package_hash}, found {info.build_hash} in {path}; install again"
        )
    from .reference import SPECS

    for spec in SPECS.values():
        _function(lib, path, spec.c_name, c_int32, operator_types(spec, POINTER(LlaisysTensor)))
    return lib, info


def operator_types(spec: Spec, tensor: Any) -> tuple[Any, ...]:
    """The parameters of an operator's C entry, its tensors given as `tensor`."""
    return (*(tensor for _ in spec.args), *(_SCALARS[scalar.dtype] for scalar in spec.scalars))


def operator_by_address(spec: Spec, lib: ctypes.CDLL | None = None) -> Any:
    """The C entry of an operator, in the library or another one, its tensors given as addresses of structs: half as
    long a call as with pointers."""
    function = (library() if lib is None else lib)[spec.c_name]
    function.restype, function.argtypes = c_int32, operator_types(spec, c_void_p)
    return function


def operator_of_file(spec: Spec, path: str | os.PathLike[str], name: object = None) -> Any:
    """The C entry of an operator in another library, which is loaded; its tensors are given as addresses. LibraryError,
    which calls it `name`, if it cannot be loaded or has no such function."""
    own = operator_by_address(spec)  # first, as the other library may be linked with this one
    name = path if name is None else name
    try:
        lib = ctypes.CDLL(str(Path(path).absolute()))
        function = operator_by_address(spec, lib)
    except OSError as error:
        raise LibraryError(f"{name} cannot be loaded: expected a shared library, found: {error}") from None
    except AttributeError:
        function = own
    # What a library does not have is looked for in those that it is linked with.
    if ctypes.cast(function, c_void_p).value == ctypes.cast(own, c_void_p).value and not Path(path).samefile(
        library_path()[0]
    ):
        found = _instead(spec, lib, path)
        raise LibraryError(f"{name}: expected the function {spec.c_prototype} found no {spec.c_name}{found}")
    return function


def _instead(spec: Spec, lib: ctypes.CDLL, path: str | os.PathLike[str]) -> str:
    """What a library that lacks the operator may have meant for it, for the error: "" if there is nothing."""
    from .reference import SPECS

    # The name as C++ compiles it: with its length before it and its parameters behind.
    mangled = rf"_Z{len(spec.c_name)}{spec.c_name}\w+".encode()
    found = [match.decode() for match in re.findall(mangled, Path(path).read_bytes()) if hasattr(lib, match.decode())]
    if found:
        return f', but {found[0]}: it wants extern "C"'
    others = [other.c_name for other in SPECS.values() if _has_own(lib, other.c_name)]
    return f", but {', '.join(others)}" if others else ""


def _has_own(lib: ctypes.CDLL, name: str) -> bool:
    own, found = (ctypes.cast(x[name], c_void_p).value if hasattr(x, name) else None for x in (library(), lib))
    return found not in (None, own)


def _function(lib: ctypes.CDLL, path: Path, name: str, restype: Any, argtypes: tuple[Any, ...]) -> Any:
    try:
        function = getattr(lib, name)
    except AttributeError:
        raise LibraryError(f"{path} is no library of this llaisys: expected the function {name}, found none") from None
    function.restype, function.argtypes = restype, argtypes
    return function


# ------------------------------------------------------------------ errors


def last_error() -> str:
    """Text of the last error of the library on this thread, "" if there was none."""
    # Not library(), which may make a call of its own, and the text is lost with the next call.
    return "" if _library is None else str(_library.llaisysLastError().decode("utf-8", "replace"))


def check_call(status: int) -> int:
    """Pass on a result that is no error (0 or positive); raise the exception of a negative status.

    An exception that a signal handler raised during the call (KeyboardInterrupt) is raised in its place.
    """
    if KEPT and get_ident() == _watcher:
        error = KEPT[0]
        KEPT.clear()
        raise error.with_traceback(None)
    if status < 0:
        raise status_error(status, last_error())
    return status


def check_handle(handle: int | None) -> int:
    """Pass on a handle; raise the error that the last status names if it is NULL."""
    if not handle:
        check_call(library().llaisysLastStatus())
        raise InternalError("expected a handle or an error, found neither")
    return handle


# -------------------------------------------------------------- interrupts
#
# Long calls of the library run without the interpreter, so that a signal handler, and with it KeyboardInterrupt, would
# have to wait. The library therefore calls back every 50 ms on threads that registered a callback. Only the main thread
# runs signal handlers, so only the main thread registers.

#: Exceptions that handlers raised during a call of the main thread, until `check_call` raises them.
KEPT: list[BaseException] = []
#: Not empty as long as the main thread has not registered, because another thread loaded the library.
PENDING: list[bool] = []
_watcher: int | None = None


def _signals() -> Generator[int, None, None]:
    """Each `send` lets the interpreter run pending signal handlers, and yields 1 if one raised, else 0.

    A generator and not a function: the interpreter runs handlers as soon as it enters Python code, which in a function
    is before any `try`, while a generator is resumed inside of it. An exception that left the callback would be printed
    and forgotten by ctypes.
    """
    answer = 0
    while True:
        try:
            while True:
                yield answer
                answer = 0
        except GeneratorExit:
            return
        except BaseException as error:
            KEPT.append(error)
            answer = 1


_generator = _signals()
next(_generator)
_callback = InterruptCallback(_generator.send)


def _watch_interrupts(lib: ctypes.CDLL) -> None:
    global _watcher
    if threading.current_thread() is threading.main_thread():
        lib.llaisysSetInterrupt(_callback, None)
        _watcher = get_ident()
        PENDING.clear()
    elif not PENDING:
        PENDING.append(True)


def register_interrupt() -> None:
    """Register the callback if this is the main thread and it has not done so yet."""
    if _library is not None:
        _watch_interrupts(_library)


def _after_fork() -> None:
    # The thread that forked is the child's only and main thread, whichever it was; a lock that another held is held
    # for ever.
    global _lock, _watcher
    _lock = threading.Lock()
    KEPT.clear()
    if _library is not None:
        _library.llaisysSetInterrupt(_callback, None)
        _watcher = get_ident()
        PENDING.clear()


os.register_at_fork(after_in_child=_after_fork)


# ----------------------------------------------------------------- machine


def set_num_threads(count: int) -> None:
    """Use `count` threads (1 to 1024, the calling one among them) in every operator. Results do not depend on it."""
    try:
        number = operator.index(count)
    except TypeError:
        number = 0
    if not 1 <= number <= 1024:
        raise InvalidArgumentError(f"set_num_threads: count: expected an integer from 1 to 1024, found {count!r}")
    check_call(library().llaisysSetNumThreads(number))


def num_threads() -> int:
    """Threads that operators use: LLAISYS_NUM_THREADS, else the physical cores that this process may use."""
    return check_call(library().llaisysNumThreads())


def usable_cpus() -> int:
    """CPUs that this process may use, hyperthreads among them: as many processes as pay."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_roof(roof: str, seconds: float) -> float:
    """What the machine does per second at best on the threads in use; see llaisysMeasureRoof in llaisys.h.

    UnsupportedError if this machine lacks it, InvalidArgumentError if there is no such roof or `seconds` is not in 0 to
    60.
    """
    result = c_double()
    check_call(library().llaisysMeasureRoof(roof.encode(), seconds, ctypes.byref(result)))
    return result.value


def _tier(name: str) -> bytes:
    if not isinstance(name, str) or name not in TIERS:
        raise InvalidArgumentError(f"isa: expected one of {', '.join(TIERS)}, found {name!r}")
    return name.encode()


def set_isa(name: str) -> None:
    """Use an instruction set tier: "scalar", "avx2", "avx512" or "amx".

    InvalidArgumentError if there is no such tier, UnsupportedError if this machine or build lacks it.
    """
    check_call(library().llaisysSetIsa(_tier(name)))


def isa() -> str:
    """The tier in use. UnsupportedError if LLAISYS_ISA asks for one that the machine lacks, InvalidArgumentError if for
    one that does not exist.
    """
    name = library().llaisysIsa()
    if name is None:
        check_call(library().llaisysLastStatus())
    return str(name.decode())


def has_isa(name: str) -> bool:
    """Whether this machine and this build have the tier. InvalidArgumentError if there is no such tier."""
    return bool(check_call(library().llaisysHasIsa(_tier(name))))


def isas() -> tuple[str, ...]:
    """The tiers that this machine and this build have, lowest first."""
    return tuple(name for name in TIERS if has_isa(name))
