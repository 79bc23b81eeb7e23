"""`llaisys try` on kernels that are right where one usually looks: each fault is found, and said for what it is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llaisys import trial
from llaisys._fenv import FloatState
from llaisys.errors import LibraryError
from llaisys.harness import Standing
from llaisys.isolation import Result, answer, in_processes
from llaisys.reference import SPECS
from llaisys.reference.spec import dims_label
from test_cli import run

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")

#: linear in rows of row-major tensors, in f32 and bf16; the macros are where the faults go.
SOURCE = """
#include <llaisys.h>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>
#include <xmmintrin.h>
#ifndef FROM
#define FROM
#endif
#ifndef STEP
#define STEP
#endif
#ifndef CELL
#define CELL
#endif
#ifndef END
#define END
#endif
#ifndef SCRATCH
#define SCRATCH
#endif
#ifndef BACKWARDS
#define BACKWARDS false
#endif
using Bf16 = uint16_t;
static float wide(float x) { return x; }
static float wide(Bf16 x) { return std::bit_cast<float>(uint32_t(x) << 16); }
static void store(float &to, float x) { to = x; }
static void store(Bf16 &to, float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    to = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class T>
static int32_t compute(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *w, const LlaisysTensor *bias) {
    if (x->ndim != 2) return LLAISYS_ERROR_SHAPE;
    const int64_t M = x->shape[0], N = w->shape[0], C = x->shape[1];
    const T *weight = static_cast<const T *>(w->data);
    int64_t stride = w->strides[0];
    FROM;
    for (int64_t m = 0; m < M; ++m) {
        SCRATCH std::vector<float> row;
        row.resize(C);
        for (int64_t c = 0; c < C; ++c) row[c] = wide(static_cast<const T *>(x->data)[m * x->strides[0] + c]);
        for (int64_t n = 0; n < N; ++n) {
            float sum[8] = {};
            for (int64_t i = 0; i < C; ++i) {
                const int64_t c = BACKWARDS ? C - 1 - i : i;
                STEP;
                sum[c % 8] += row[c] * wide(weight[n * stride + c]);
            }
            float s = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
            if (bias) s += wide(static_cast<const T *>(bias->data)[n * bias->strides[0]]);
            CELL;
            store(static_cast<T *>(out->data)[m * out->strides[0] + n], s);
        }
    }
    END;
    return LLAISYS_OK;
}
extern "C" int32_t llaisysLinear(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight,
                                 const LlaisysTensor *bias) {
    if (x->dtype == LLAISYS_DTYPE_F32) return compute<float>(out, x, weight, bias);
    if (x->dtype == LLAISYS_DTYPE_BF16) return compute<Bf16>(out, x, weight, bias);
    return LLAISYS_ERROR_DTYPE;
}
"""
PACKED = """static std::map<const void *, std::vector<T>> packs; auto &pack = packs[w->data];
if (int64_t(pack.size()) != N * C) { pack.resize(N * C);
for (int64_t n = 0; n < N; ++n) memcpy(&pack[n * C], weight + n * stride, C * sizeof(T)); }
weight = pack.data(); stride = C""".replace("\n", " ")


@pytest.fixture
def held(tmp_path: Path) -> Callable[..., list[Result]]:
    """The results of the kernel with these macros."""

    def held(dtype: str = "f32", flags: tuple[str, ...] = (), **macros: str) -> list[Result]:
        source = tmp_path / "my_linear.cpp"
        source.write_text(SOURCE)
        given = [f"-D{name}={value}" for name, value in macros.items()]
        return list(in_processes(trial.jobs_of("linear", trial.build(source, tmp_path, [*given, *flags]), [dtype])))

    return held


def faults(found: list[Result]) -> list[Result]:
    assert found
    return [result for result in found if result.outcome == "fault"]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_right(dtype: str, held: Callable[..., list[Result]]) -> None:
    found = held(dtype)
    assert not faults(found) and sum(result.outcome == "pass" for result in found) > 50


@pytest.mark.parametrize(
    "cell",
    [
        "if (N > 512 && n >= N - N % 8) s = 0",
        "if (M == 512 && N * C > 1 << 20 && m >= 100 && m < 110) s += 1",
        "if (M == 1 && C >= 896 && N > 500) s *= 1.01f",
        "if (N > 100000) s += 1",
    ],
)
def test_wrong_beyond_blocks(cell: str, held: Callable[..., list[Result]]) -> None:
    large = {dims_label(dims) for dims in SPECS["linear"].large}
    found = faults(held(CELL=cell))
    assert found and {result.case for result in found} <= large


def test_terms_that_are_cut_off(held: Callable[..., list[Result]]) -> None:
    found = faults(held(STEP="if (c >= 4096) break"))
    assert found and all("C4999" in result.case for result in found)


@pytest.mark.parametrize("backwards", ["(M > 1 && m % 8 == 7)", "(M >= 16)"])
def test_another_order_for_some_rows(backwards: str, held: Callable[..., list[Result]]) -> None:
    """In bf16, where the final rounding hides the order unless the sum is nothing but rounding errors."""
    found = {result.case: result.text for result in faults(held("bf16", BACKWARDS=backwards))}
    assert "alone: out: " in found["rounding-errors-only"]


def test_scratch_that_threads_share(held: Callable[..., list[Result]]) -> None:
    (fault,) = faults(held(SCRATCH="static"))
    assert fault.case.endswith("from two threads") and "from two threads at once: out: " in fault.text


def test_weights_kept_by_address(held: Callable[..., list[Result]]) -> None:
    found = {result.case.split(", ")[-1]: result.text for result in faults(held(FROM=PACKED))}
    # Memory of an earlier case may be used again for this one, whose first call is wrong then.
    assert re.match(
        "depends on an earlier call on the same addresses: out: |out: .* out of bound", found["on other contents"]
    )


def test_zeros_that_are_skipped(held: Callable[..., list[Result]]) -> None:
    (fault,) = faults(held(STEP="if (row[c] == 0) continue"))
    assert fault.case == "NaN-and-infinities" and "expected nan" in fault.text


def test_floating_point_state_left_changed(held: Callable[..., list[Result]]) -> None:
    for end, text in (
        ("_mm_setcsr(_mm_getcsr() | 0x8040)", "subnormal numbers become 0"),
        ("_mm_setcsr(_mm_getcsr() | 0x4000)", "it rounds another way"),
    ):
        found = faults(held(END=end))
        assert found and all(r.text.endswith(f"state of the thread was left changed: {text}") for r in found)


def test_floating_point_state_changed_by_loading(held: Callable[..., list[Result]], tmp_path: Path) -> None:
    """As crtfastmath does, which gcc links to what is compiled with -Ofast. It is restored before anything else."""
    constructor = tmp_path / "constructor.cpp"
    constructor.write_text("#include <xmmintrin.h>\nstatic const int once = (_mm_setcsr(_mm_getcsr() | 0x8000), 0);\n")
    (fault,) = faults(held(flags=(str(constructor),)))
    assert fault.case == "loading the library" and fault.text.endswith("changed: subnormal numbers become 0")


def test_the_floating_point_state_is_this_threads() -> None:
    state = FloatState()
    assert state.restore() == ""


def test_a_refusal_after_writing(held: Callable[..., list[Result]]) -> None:
    found = faults(held(END="if (M == 5) return LLAISYS_ERROR_UNSUPPORTED"))
    assert found and all("UNSUPPORTED, but the output out was written to" in result.text for result in found)


def test_the_call_that_crashes_is_named(held: Callable[..., list[Result]]) -> None:
    found = faults(held(FROM="if (bias && M == 9 && x->strides[0] > C) exit(0); if (bias && M == 7) abort()"))
    ended, crashed = sorted({result.text for result in found}, reverse=True)
    assert ended.startswith("the kernel ended the process, exit status 0, during layout padded (")
    assert crashed.startswith("crashed with SIGABRT, during the call (1 thread; each tensor right before a page that")


def test_what_stands_keeps_its_addresses() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    call = Standing(SPECS["add"], {"a": x, "b": x})
    before = [y.ctypes.data for y in call.inputs.values()]
    assert (call("the call")[0] == 2 * x).all()
    call.fill({"a": x, "b": 2 * x})
    assert (call("the call")[0] == 3 * x).all() and before == [y.ctypes.data for y in call.inputs.values()]


def test_functions_that_are_there_instead(tmp_path: Path) -> None:
    source = tmp_path / "my_linear.cpp"
    source.write_text("int llaisysLinear(float *x) { return *x > 0; }")
    with pytest.raises(LibraryError, match=r'found no llaisysLinear, but _Z13llaisysLinearPf: it wants extern "C"$'):
        trial.jobs_of("linear", trial.build(source, tmp_path), ["f32"])
    source.write_text(SOURCE)
    with pytest.raises(LibraryError, match="found no llaisysRope, but llaisysLinear$"):
        trial.jobs_of("rope", trial.build(source, tmp_path), ["f32"])


def test_an_exit_status_is_no_signal() -> None:
    with pytest.raises(LibraryError, match="a kernel cannot be used: expected an answer, found exit status 3$"):
        answer("a kernel", "an answer", lambda: os._exit(3))


def test_a_limit_of_ones_own(tmp_path: Path) -> None:
    source = tmp_path / "my_linear.cpp"
    source.write_text(SOURCE)
    done = run("try", "linear", str(source), "--dtype", "f32", "--no-bench", "--timeout", "1", "--flags=-DEND=for(;;)")
    text = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 1 and "no end within 1 s, during the call (1 thread; " in text, text
