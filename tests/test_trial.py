"""`llaisys try`: kernels from files, right, wrong in each way, and refusing; and in the graph of a model."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import llaisys
from llaisys import trial
from llaisys.errors import InvalidArgumentError, LibraryError, UnsupportedError
from llaisys.isolation import Result, in_processes
from llaisys.reference import SPECS
from test_cli import environment, run

pytestmark = pytest.mark.skipif(shutil.which("c++") is None or shutil.which("cc") is None, reason="no compiler")

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_add.cpp"
LOOP = "sum[i] = x[i] + y[i];"
# The example with a plain loop, which the tests replace, in place of its parts for several threads.
SERIAL = """    const auto *x = static_cast<const float *>(a->data), *y = static_cast<const float *>(b->data);
    auto *sum = static_cast<float *>(out->data);
    for (int64_t i = 0; i < count; ++i) sum[i] = x[i] + y[i];
    return LLAISYS_OK;
}
"""
# Those that use the library are linked with it, and its function must not be taken for theirs.
MISSPELT = """
#include <llaisys.h>
int32_t llaisysAddd(LlaisysTensor *out, const LlaisysTensor *a, const LlaisysTensor *b) { return llaisysNumThreads(); }
"""
OVERLOADED = """
#include <llaisys.h>
int32_t llaisysAdd(const LlaisysTensor *out, const LlaisysTensor *a, const LlaisysTensor *b) {
    return llaisysNumThreads();
}
"""
ABORTING = """
#include <cstdlib>
static const bool never = (std::abort(), true);
"""


@pytest.fixture
def write(tmp_path: Path):
    """A file with the example, its loop replaced, or with another text."""

    def write(loop: str = LOOP, text: str | None = None, name: str = "my_add.cpp") -> Path:
        path = tmp_path / name
        head, parallel, _ = EXAMPLE.read_text().partition("    struct Arrays {")
        assert parallel
        path.write_text(head + SERIAL.replace(LOOP, loop) if text is None else text)
        return path

    return write


def tried(path: Path, *options: str, op: str = "add") -> subprocess.CompletedProcess[bytes]:
    return run("try", op, str(path), *options, env={"COLUMNS": "200"})


def results(path: Path, folder: Path, timeout: float = 60.0, dtype: str = "f32") -> list[Result]:
    library = trial.build(path, folder)
    return list(in_processes(trial.jobs_of("add", library, [dtype]), timeout=timeout))


# -------------------------------------------------------------- right, wrong


def test_a_right_kernel() -> None:
    """Held to the SPEC in the dtype that it takes, and timed in that one only."""
    done = tried(EXAMPLE, "--phase", "decode")
    text = done.stdout.decode()
    assert done.returncode == 0, text + done.stderr.decode()
    assert "cases keep to the contract" in text and "not taken: bf16, the call: UNSUPPORTED" in text
    assert "not taken: f32, layout padded: UNSUPPORTED" in text and "layout packed" not in text
    assert re.search(r"case +dtype +yours +± +llaisys +torch +x llaisys +x torch", text)
    timed = re.findall(r"^(\S+ residual \w+) +(\w+) +([\d.]+) +\d+% +([\d.]+)", text, re.M)
    assert {(case, dtype) for case, dtype, *_ in timed} == {(f"{n}B residual decode", "f32") for n in ("0.5", "1.5")}
    assert all(float(time) > 0 for row in timed for time in row[2:])


@pytest.mark.parametrize(
    ("loop", "text"),
    [
        ("sum[i] = x[i] - y[i];", "wrong of"),
        ("sum[i] = x[i] + y[i]; if (count) sum[count] = 0;", "SIGSEGV|bytes around the output out were written to"),
        ("sum[i] = x[i] + y[i]; static_cast<float *>(a->data)[0] = 7;", "the input a was written to|out in the memory"),
        ("*static_cast<volatile int *>(nullptr) = 1;", "crashed with SIGSEGV"),
        ("sum[i] = x[i] + y[i]; if (count == 1) return LLAISYS_ERROR_INTERNAL;", "the call: INTERNAL: status -12"),
        ("sum[i] = x[i] + y[i]; if (count == 1) return 7;", "the call: UNKNOWN: status 7"),
    ],
)
def test_a_wrong_kernel(loop: str, text: str, write) -> None:
    """What is wrong is said, and it is not timed."""
    done = tried(write(loop), "--dtype", "f32")
    found = done.stdout.decode()
    assert done.returncode == 1 and re.search(text, found) and "x llaisys" not in found, found + done.stderr.decode()


def test_wrong_at_large_sizes_only(write) -> None:
    """What the boundary sizes of the SPEC do not show is found before it is timed: wrong numbers, an error, a crash."""
    for loop, text in (
        ("sum[i] = x[i] + y[i]; if (count > 400000) return LLAISYS_ERROR_OUT_OF_MEMORY;", "found OUT_OF_MEMORY"),
        ("sum[i] = x[i] + (count > 400000 ? 0 : y[i]);", "0.5B residual prefill: yours: out: "),
        ("sum[i] = x[i] + y[i]; if (count > 400000) *(volatile int *)8 = 1;", "crashed with SIGSEGV"),
    ):
        done = tried(write(loop), "--dtype", "f32", "--phase", "prefill")
        assert done.returncode == 1 and text in done.stdout.decode(), done.stdout.decode() + done.stderr.decode()


def test_a_kernel_that_hangs(write, tmp_path: Path) -> None:
    found = results(write('sum[i] = x[i] + y[i]; while (count == 1) asm volatile("");'), tmp_path, timeout=1.0)
    assert any(result.outcome == "fault" and "no end within 1 s" in result.text for result in found)
    assert any(result.outcome == "pass" for result in found)


def test_a_kernel_that_takes_nothing(write) -> None:
    done = tried(write("return LLAISYS_ERROR_SHAPE;"), "--dtype", "f16")
    assert done.returncode == 2 and "not taken: f16, the call: UNSUPPORTED" in done.stdout.decode()
    # And one that takes only what is empty, of which nothing can be said.
    done = tried(write("return LLAISYS_ERROR_SHAPE;"), "--dtype", "f32")
    text = done.stdout.decode()
    assert done.returncode == 2 and re.search(r"not taken: f32, the call: SHAPE: \d+ cases \(.*, \.\.\.\)", text), text


def test_a_large_call_may_be_refused(write) -> None:
    """Which is told, and is no fault."""
    loop = "sum[i] = x[i] + y[i]; if (count > 400000) return LLAISYS_ERROR_UNSUPPORTED;"
    done = tried(write(loop), "--dtype", "f32", "--phase", "prefill")
    text = done.stdout.decode()
    assert done.returncode == 0 and "the call: UNSUPPORTED: 2 cases (0.5B residual prefill, 1.5B" in text, text


def test_nothing_is_left_of_one_that_is_killed(write, tmp_path: Path) -> None:
    """Neither processes, in which the kernel hangs, nor the folder that it was compiled to."""
    path = write('sum[i] = x[i] + y[i]; while (count == 1) asm volatile("");')
    command = [sys.executable, "-m", "llaisys", "try", "add", str(path), "--dtype", "f32", "--no-bench"]
    folder = tmp_path / "temporary"
    folder.mkdir()
    env = environment(TMPDIR=str(folder))
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for _ in range(300):
            time.sleep(0.1)
            if list(folder.glob("llaisys-*/my_add.so")):
                break
        time.sleep(2)
        process.terminate()
        output, _ = process.communicate(timeout=20)  # returns only when no process has the pipe any more
    assert process.returncode == 128 + signal.SIGTERM and not list(folder.iterdir()), output


def test_every_operator() -> None:
    """The library itself, handed in as if it were somebody's: of each operator all cases pass, and none is refused."""
    path = llaisys._lib.library_path()[0]
    found = list(in_processes([job for op in SPECS for job in trial.jobs_of(op, path, ["bf16"])]))
    assert {result.op for result in found} == set(SPECS)
    assert not [result for result in found if result.outcome != "pass" or result.variants_refused]


def test_other_refusals_of_the_library_are_faults() -> None:
    """A kernel of the library must take every call of the SPEC: there a refusal is no excuse."""
    from llaisys.harness import KernelFault, Refusal
    from llaisys.harness import run as call

    values = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float16)}
    with pytest.raises(KernelFault) as caught:
        call(SPECS["add"], values, "the call")
    assert not isinstance(caught.value, Refusal)


# --------------------------------------------------------------------- files


def test_c_and_a_library(write, tmp_path: Path) -> None:
    """Sources in C, shared libraries, flags of one's own, and other functions of llaisys.h."""
    source = """
        #include <llaisys.h>
        int32_t llaisysAdd(LlaisysTensor *out, const LlaisysTensor *a, const LlaisysTensor *b) {
            if (llaisysNumThreads() != FOUND) return LLAISYS_ERROR_INTERNAL;
            if (out->ndim != 1 || out->dtype != LLAISYS_DTYPE_F32) return LLAISYS_ERROR_SHAPE;
            for (int64_t i = 0; i < out->shape[0]; ++i)
                ((float *)out->data)[i * out->strides[0]] =
                    ((float *)a->data)[i * a->strides[0]] + ((float *)b->data)[i * b->strides[0]];
            return LLAISYS_OK;
        }
    """
    path = write(text=source, name="my add.c")  # with a space
    library = trial.build(path, tmp_path, [f"-DFOUND={llaisys.num_threads()}"])
    x = np.arange(5, dtype=np.float32)
    for file, flags in ((library, []), (path, [f"-DFOUND={llaisys.num_threads()}"])):
        assert (trial.operator("add", file, flags)(x, x) == 2 * x).all()
    assert (trial.operator("add", path, " ".join(flags))(x, x) == 2 * x).all()
    other = write(text=source.replace(" + ", " - "), name="other.c")
    trial.build(other, tmp_path, flags).replace(library)  # a library is loaded anew when it has changed
    assert (trial.operator("add", library)(x, x) == 0 * x).all()
    done = tried(path, "--dtype", "f32", "--no-bench", "--threads", "1", "--flags=-DFOUND=llaisysNumThreads()")
    assert done.returncode == 0 and "not taken: f32, the call: SHAPE" in done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "text", "op", "found"),
    [
        ("my_add.cpp", "int x = ;", "add", "expected a source that compiles, found exit status 1 of c++"),
        ("my_add.cpp", "int x;", "add", "expected the function int32_t llaisysAdd(LlaisysTensor *out, const"),
        (
            "my_add.so",
            "no library",
            "add",
            "expected a source (.c, .cc, .cpp, .cxx) or a shared library, found neither",
        ),
        ("my_add.txt", "\x7fELF", "add", "my_add.txt cannot be loaded: expected a shared library, found: "),
        ("my_add.c", MISSPELT, "add", "my_add.c: expected the function int32_t llaisysAdd("),
        ("my_add.cpp", OVERLOADED, "add", "my_add.cpp: expected the function int32_t llaisysAdd("),
        ("my_add.cpp", ABORTING, "add", "my_add.cpp cannot be used: expected the function llaisysAdd, found SIGABRT"),
        ("my_add.cpp", "int x;", "no_such_op", "op: expected one of add, "),
    ],
)
def test_files_that_are_no_kernel(name: str, text: str, op: str, found: str, write) -> None:
    done = tried(write(text=text, name=name), op=op)
    error = done.stderr.decode()
    assert done.returncode == 2 and found in error and "Traceback" not in error, error
    assert text != "int x = ;" or "my_add.cpp:1:9: error" in error  # what the compiler says is there to be read


def test_no_file_and_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a file, found none"):
        trial.operator("add", tmp_path / "none.cpp")
    with pytest.raises(InvalidArgumentError, match="expected a file, found a folder"):
        trial.operator("add", tmp_path)
    for flags in ('"', ["-fsyntax-only"]):
        with pytest.raises((InvalidArgumentError, LibraryError), match="flags: expected words|found no library of c"):
            trial.operator("add", EXAMPLE, flags)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(LibraryError, match="expected a compiler, found: .*no-such-compiler.*; CXX names another one"):
        trial.operator("add", EXAMPLE)


# -------------------------------------------------------------------- Python


def test_in_a_model(write) -> None:
    """In the place of a kernel of the graph."""
    source = """
        #include <llaisys.h>
        #include <cmath>
        int32_t llaisysSwiglu(LlaisysTensor *out, const LlaisysTensor *gate, const LlaisysTensor *up) {
            if (out->ndim != 2 || out->dtype != LLAISYS_DTYPE_F32) return LLAISYS_ERROR_UNSUPPORTED;
            const auto row = [](const LlaisysTensor *x, int64_t i) { return (float *)x->data + i * x->strides[0]; };
            for (int64_t i = 0; i < out->shape[0]; ++i)
                for (int64_t j = 0; j < out->shape[1]; ++j)
                    row(out, i)[j] = row(up, i)[j] * (row(gate, i)[j] / (1 + std::exp(-row(gate, i)[j])));
            return LLAISYS_OK;
        }
    """
    calls = []
    swiglu = trial.operator("swiglu", write(text=source, name="my_swiglu.cc"))

    def counted(gate, up):
        calls.append(gate.shape)
        return swiglu(gate, up)

    with llaisys.Qwen2("tiny", dtype="f32") as model:
        logits = model.logits([1, 2, 3])
        with llaisys.Qwen2("tiny", dtype="f32", kernels={"swiglu": counted}) as mine:
            found = mine.logits([1, 2, 3])
    assert len(calls) == 5 and np.abs(found - logits).max() < 1e-3 * np.abs(logits).max()


def test_errors_of_an_operator() -> None:
    """Arguments are checked as those of llaisys.ops; what the kernel itself refuses names it and its status."""
    add = trial.operator("add", EXAMPLE)
    x = np.ones((2, 3), np.float32)
    assert (add(x, b=x) == 2).all() and add.__name__ == "add"
    out = np.empty_like(x)
    assert add(x, x, out=out) is out and (out == 2).all()
    with pytest.raises(llaisys.errors.ShapeError, match="add: b: expected"):
        add(x, x[:1])
    with pytest.raises(UnsupportedError, match=r"add: .*my_add.cpp: expected OK, found UNSUPPORTED \(status -10\)"):
        add(x.astype(np.float16), x.astype(np.float16))
