"""Loading the library: what is found, what is refused and how it says so; threads, tiers, errors, Ctrl-C, fork."""

import copy
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys.diff.isolated
import llaisys.harness
from llaisys import _lib, errors
from llaisys.reference import SPECS


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAISYS_")} | env
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


LOAD = "import llaisys._lib as lib\ntry: lib.library()\nexcept lib.LibraryError as e: print(e)\nelse: print('loaded')\n"


def test_the_library_of_the_package_is_loaded() -> None:
    info = _lib.library_info()
    assert info.path.is_file() and info.path.name == "libllaisys.so"
    assert info.version == llaisys.__version__
    if not info.overridden:
        assert not info.stale
    assert {spec.c_name for spec in SPECS.values()} <= set(vars(_lib.library()))


def test_an_operator_has_the_prototype_of_its_spec() -> None:
    function = _lib.library().llaisysAddRmsNorm
    assert function.argtypes == (*[ctypes.POINTER(_lib.LlaisysTensor)] * 5, ctypes.c_float)
    assert function.restype is ctypes.c_int32


def test_import_is_quick_and_needs_neither_torch_nor_the_library() -> None:
    code = (
        "import time; t = time.perf_counter(); import llaisys, sys; t = time.perf_counter() - t\n"
        "import llaisys.errors, llaisys.tensor\n"
        "assert 'torch' not in sys.modules; print(t, llaisys.__version__)"
    )
    seconds = []
    for _ in range(3):  # an editable install may have to compile first
        done = run(code, LLAISYS_LIBRARY="/nonexistent")
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.split()[0]))
    assert min(seconds) < 0.5


def test_everything_exported_is_there() -> None:
    for name in llaisys.__all__:
        assert getattr(llaisys, name) is not None
    assert set(llaisys.__all__) <= set(dir(llaisys))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = llaisys.nonsense


# ----------------------------------------------------------- refused libraries


def test_a_missing_library_is_named() -> None:
    text = run(LOAD, LLAISYS_LIBRARY="/nowhere/lib.so").stdout
    assert all(s in text for s in ("LLAISYS_LIBRARY", "/nowhere/lib.so", "missing", "found none"))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_text("no library")
    text = run(LOAD, LLAISYS_LIBRARY=str(path)).stdout
    assert "cannot be loaded" in text and str(path) in text
    assert "a folder" in run(LOAD, LLAISYS_LIBRARY=str(tmp_path)).stdout


def test_another_library_is_refused() -> None:
    other = importlib.import_module("ml_dtypes._ml_dtypes_ext").__file__
    assert other is not None
    text = run(LOAD, LLAISYS_LIBRARY=other).stdout
    assert "no library of this llaisys" in text and "llaisysAbiVersion" in text


def test_another_abi_is_refused() -> None:
    text = run("import llaisys._build as b; b.ABI_VERSION = 4711\n" + LOAD).stdout
    assert all(s in text for s in ("another ABI", "expected 4711", f"found {_lib.library_info().abi}"))


def test_a_stale_library_is_refused_but_allowed_as_an_override() -> None:
    stale = "import llaisys._build as b; b.BUILD_HASH = 'cafe'\n"
    info = _lib.library_info()
    text = run(stale + LOAD).stdout
    assert all(s in text for s in ("stale", "cafe", info.build_hash, str(info.path)))
    done = run(stale + LOAD + "print(lib.library_info())", LLAISYS_LIBRARY=str(info.path))
    assert done.stdout.startswith("loaded") and "overridden=True" in done.stdout
    done = run(stale + LOAD + "print(lib.library_info().stale)", LLAISYS_LIBRARY=str(info.path))
    assert done.stdout.split() == ["loaded", "True"]


def test_an_empty_override_is_none() -> None:
    assert run(LOAD, LLAISYS_LIBRARY="").stdout.strip() == "loaded"


def test_a_package_that_is_not_built_says_so() -> None:
    stderr = run("import sys; sys.modules['llaisys._build'] = None\n" + LOAD).stderr
    assert "ImportError: llaisys: expected an installed package, found only its sources in" in stderr


def test_a_failed_load_can_be_repeated() -> None:
    code = LOAD + "import os; del os.environ['LLAISYS_LIBRARY']\n" + LOAD
    assert run(code, LLAISYS_LIBRARY="/nowhere").stdout.strip().endswith("loaded")


# ------------------------------------------------------------ threads and tiers


def test_threads() -> None:
    before = llaisys.num_threads()
    try:
        llaisys.set_num_threads(3)
        assert llaisys.num_threads() == 3
        for wrong in (0, -1, 1025, 2**32 + 1, 1.5, "2", None):
            with pytest.raises(errors.InvalidArgumentError, match="set_num_threads"):
                llaisys.set_num_threads(wrong)  # type: ignore[arg-type]
        assert llaisys.num_threads() == 3
    finally:
        llaisys.set_num_threads(before)


def test_threads_from_the_environment() -> None:
    assert run("import llaisys; print(llaisys.num_threads())", LLAISYS_NUM_THREADS="5").stdout.strip() == "5"


def test_tiers() -> None:
    before = llaisys.isa()
    have = llaisys.isas()
    assert have[0] == "scalar" and before in have
    try:
        for name in _lib.TIERS:
            assert llaisys.has_isa(name) == (name in have)
            if name in have:
                llaisys.set_isa(name)
                assert llaisys.isa() == name
            else:
                with pytest.raises(errors.UnsupportedError, match=name):
                    llaisys.set_isa(name)
    finally:
        llaisys.set_isa(before)
    for wrong in ("sse9", "avx2\0", "", None, 3):
        with pytest.raises(errors.InvalidArgumentError, match="expected one of scalar"):
            llaisys.set_isa(wrong)  # type: ignore[arg-type]


def test_the_tier_of_the_environment() -> None:
    assert run("import llaisys; print(llaisys.isa())", LLAISYS_ISA="scalar").stdout.strip() == "scalar"
    done = run(
        "import llaisys, numpy as np\n"
        "for call in (llaisys.isa, lambda: llaisys.ops.add(np.ones(3, 'f4'), np.ones(3, 'f4'))):\n"
        "    try: call()\n"
        "    except llaisys.LlaisysError as e: print(type(e).__name__, e)\n",
        LLAISYS_ISA="sse9",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("sse9" in line for line in lines), done


# ---------------------------------------------------------------------- errors


def test_every_status_of_the_header_has_its_exception() -> None:
    lib = _lib.library()
    classes = {cls.status: cls for cls in errors.LlaisysError.__subclasses__() if cls.status}
    names = {status: lib.llaisysStatusName(status).decode() for status in range(-1, -40, -1)}
    assert {s for s, name in names.items() if name != "UNKNOWN"} == set(classes)
    for status, cls in classes.items():
        short = cls.__name__.removesuffix("Error").removesuffix("Range").removesuffix("Call")
        assert short.upper() == names[status].replace("_", "")
        error = errors.status_error(status, "text")
        assert type(error) is cls and str(error) == "text"
        assert "status" in str(errors.status_error(status, ""))
    assert type(errors.status_error(-99, "text")) is errors.InternalError


def test_errors_are_also_the_natural_builtins() -> None:
    builtins = {
        errors.InvalidArgumentError: ValueError,
        errors.ShapeError: ValueError,
        errors.DTypeError: TypeError,
        errors.IndexRangeError: IndexError,
        errors.OutOfMemoryError: MemoryError,
        errors.LibraryError: ImportError,
        errors.CheckpointError: ValueError,
    }
    assert all(issubclass(a, b) and issubclass(a, errors.LlaisysError) for a, b in builtins.items())


def error_classes(base: type[Exception] = errors.LlaisysError) -> list[type[Exception]]:
    return [base, *(kind for sub in base.__subclasses__() for kind in error_classes(sub))]


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickle(kind: type[Exception]) -> None:
    fields: dict[str, Any] = {"file": "config.json", "field": "hidden_size", "expected": "a number > 0", "found": -1}
    of_file = kind in (errors.CheckpointError, errors.CaseError, errors.CheckpointError.__base__)
    error = kind(**fields) if of_file else kind("text")
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is kind and vars(found) == vars(error) and found.args == error.args
        assert vars(found) == (fields if of_file else {})
        assert str(found) == ("config.json: hidden_size: expected a number > 0, found -1" if of_file else "text")


def test_the_text_of_an_error_belongs_to_its_thread() -> None:
    found: dict[int, list[str]] = {n: [] for n in range(4)}

    def work(n: int) -> None:
        for _ in range(200):
            try:
                llaisys.ops.add(np.ones(3, np.float32), np.ones(3, np.float32), out=np.ones(n + 10, np.float32))
            except errors.ShapeError as error:
                found[n].append(str(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(texts) == 200 and all(f"{n + 10}" in text for text in texts) for n, texts in found.items())


# ---------------------------------------------------------------------- Ctrl-C

LONG = """
import time, signal, sys, threading
import numpy as np, llaisys
from llaisys import ops
llaisys.set_isa("scalar"); llaisys.set_num_threads(1)
w = np.ones((1024, 4096), np.float32)

def ones(count):  # that many rows of one row's memory
    return np.lib.stride_tricks.as_strided(w, (count, 4096), (0, 4))

def seconds(x):
    start = time.monotonic()
    ops.linear(x, w)
    return time.monotonic() - start

def long(wanted):  # an x for which linear(x, w) takes about `wanted` seconds, whatever machine and kernels
    count, took = 16, 0
    while took < 0.1:
        count *= 2
        took = min(seconds(ones(count)) for _ in range(2))
    return ones(int(count * wanted / took) + 1)
"""


def interrupt(code: str, expect: str, setup: str = LONG) -> tuple[float, str]:
    """Seconds from SIGINT to the line `expect` + monotonic time that the code prints, and all that it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", setup + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline().strip() == "ready", process.stderr.read()
            time.sleep(0.5)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    lines = [line for line in out.splitlines() if line.startswith(expect)]
    assert lines, (out, err)
    assert "Exception ignored" not in err
    return float(lines[0].split()[-1]) - sent, out


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call(threads: int) -> None:
    code = f"""
llaisys.set_num_threads({threads})
x = long(10)
print("ready", flush=True)
try: ops.linear(x, w)
except KeyboardInterrupt: print("interrupted", time.monotonic())
else: print("finished", time.monotonic())
assert (ops.add(x[:2], x[:2]) == 2).all()
"""
    # 200 ms are promised; a busy machine may need another try.
    assert any(interrupt(code, "interrupted")[0] < 0.2 for _ in range(4))


def test_an_exception_of_a_handler_comes_out_of_the_call() -> None:
    code = """
class Mine(BaseException): pass
def handler(*_): raise Mine
signal.signal(signal.SIGINT, handler)
x = long(10)
print("ready", flush=True)
for _ in range(2):
    try: ops.linear(x, w)
    except Mine: print("mine", time.monotonic(), flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0.2); signal.signal(signal.SIGALRM, handler)
"""
    seconds, out = interrupt(code, "mine")
    assert seconds < 5 and out.count("mine") == 2


def test_a_handler_that_does_not_raise_does_not_end_the_call() -> None:
    code = """
x = long(4)
signal.signal(signal.SIGINT, lambda *_: print("handled", time.monotonic()))
print("ready", flush=True)
y = ops.linear(x, w)
print("finished", time.monotonic())
assert (y == 4096).all(); print("right")
"""
    seconds, out = interrupt(code, "handled")
    lines = out.split()
    assert lines[::2] == ["handled", "finished", "right"] and seconds < 2
    assert float(lines[3]) - float(lines[1]) > 0.5  # it went on for long


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_may_call_operators(threads: int) -> None:
    """In the midst of a call of the same one: neither takes the other's memory."""
    code = f"""
llaisys.set_num_threads({threads})
x, rng = long(1), np.random.default_rng(0)
inner = rng.standard_normal((516, 5000), np.float32), rng.standard_normal((20, 5000), np.float32)
wanted, found = ops.linear(*inner), []
signal.signal(signal.SIGALRM, lambda *_: found.append(ops.linear(*inner)))
for _ in range(3):
    before = len(found)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    y = ops.linear(x, w)
    assert len(found) == before + 1
    assert (y == 4096).all()
    assert np.array_equal(found[-1], wanted)
"""
    done = run(LONG + code)
    assert done.returncode == 0 and not done.stderr, done


def test_ctrl_c_when_another_thread_loaded_the_library() -> None:
    load = "t = threading.Thread(target=llaisys.isas); t.start(); t.join(); assert llaisys._lib.PENDING\n"
    code = """
x = long(10)
print("ready", flush=True)
try: ops.linear(x, w)
except KeyboardInterrupt: print("interrupted", time.monotonic())
"""
    setup = LONG.replace("llaisys.set_isa", load + "llaisys.set_isa")
    assert interrupt(code, "interrupted", setup)[0] < 5


# ------------------------------------------------------------------------ fork


@pytest.mark.parametrize("fork_in_thread", [False, True])
def test_operators_and_ctrl_c_after_fork(fork_in_thread: bool) -> None:
    code = f"""
llaisys.set_num_threads(2)
x = long(10)
assert (ops.linear(x[:64], w[:64]) == 4096).all()
def child():
    pid = os.fork()
    if pid == 0:
        ok = (ops.linear(x[:64], w[:64]) == 4096).all()
        def handler(*_): raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, handler); signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.monotonic()
        try: ops.linear(x, w)
        except KeyboardInterrupt: ok = ok and time.monotonic() - start < 5
        else: ok = False
        os._exit(0 if ok else 1)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
if {fork_in_thread}:
    t = threading.Thread(target=child); t.start(); t.join()
else: child()
"""
    done = run("import os\n" + LONG + code)
    assert "status 0" in done.stdout, done


def test_two_threads_compute_at_once() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 256), dtype=np.float32), rng.standard_normal((128, 256), dtype=np.float32)
    expected = llaisys.ops.linear(x, w)
    wrong: list[int] = []

    def work(n: int) -> None:
        for rows in range(1, 64):
            if not np.array_equal(llaisys.ops.linear(x[:rows], w), expected[:rows]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ----------------------------------------------------------- threads for others


@pytest.mark.parametrize(("count", "grain"), [(0, 4), (-3, 1), (1, 1), (1000, 7), (1000, 0), (5, 2**62)])
def test_parallel_for_covers_the_range_once(count: int, grain: int) -> None:
    parts: list[tuple[int, int]] = []  # appending is atomic
    library = _lib.library()

    @_lib.PartCallback
    def body(context: int, begin: int, end: int) -> None:
        assert context == 42
        parts.append((begin, end))

    assert library.llaisysParallelFor(count, grain, body, 42) == 0
    assert sorted(i for begin, end in parts for i in range(begin, end)) == list(range(count))
    assert all(end - begin <= max(grain, 1) for begin, end in parts)


def test_parallel_for_within_itself_and_without_a_body() -> None:
    library = _lib.library()
    inner: list[int] = []

    @_lib.PartCallback
    def add(_: int, begin: int, end: int) -> None:
        inner.append(end - begin)

    @_lib.PartCallback
    def outer(_: int, begin: int, end: int) -> None:
        assert library.llaisysParallelFor(10, 3, add, None) == 0

    assert library.llaisysParallelFor(8, 1, outer, None) == 0
    assert sum(inner) == 80
    with pytest.raises(llaisys.errors.InvalidArgumentError, match="body: expected a function, found NULL"):
        _lib.check_call(library.llaisysParallelFor(1, 1, _lib.PartCallback(), None))
