"""`llaisys check`: every case of every SPEC, and kernels that misbehave in each way that it looks for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from kernel_harness import Array
from llaisys import conformance as module
from llaisys import harness, isolation
from llaisys.case import load_case
from llaisys.conformance import Job, conformance, plan, tiers
from llaisys.errors import InternalError, InvalidArgumentError
from llaisys.isolation import Result
from llaisys.reference import SPECS, Spec
from test_cli import at_terminal, run

Run = Callable[..., tuple[Array, ...]]


def results(*ops: str, dtype: str = "bf16", threads: int | None = None, save: str | None = None) -> list[Result]:
    return list(conformance(plan(ops, [dtype], llaisys.isas()[:1], threads, save), timeout=20))


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[tuple[Array, ...], Mapping[str, Any], str], Any]) -> None:
    """Kernels whose outputs go through `change`; the processes of the check are forked, and so have them too."""
    right = harness.run

    def wrong(spec: Spec, values: Mapping[str, Any], where: str, *args: Any, **options: Any) -> tuple[Array, ...]:
        outputs = right(spec, values, where, *args, **options)
        changed = change(outputs, values, where)
        return outputs if changed is None else changed

    monkeypatch.setattr(module, "run", wrong)


# ------------------------------------------------------------------- quiet


def test_everything_keeps_to_the_contract() -> None:
    found = list(conformance(plan((), (), llaisys.isas(), None, None)))
    assert not [r for r in found if r.outcome != "pass"]
    for op, spec in SPECS.items():
        for dtype in spec.dtypes:
            mine = [r for r in found if (r.op, r.dtype) == (op, dtype)]
            assert {r.isa for r in mine} == set(llaisys.isas())
            assert sum(r.local.checked for r in mine) > 100, (op, dtype)
            assert any("shared by threads" in r.case for r in mine)


def test_tiers_are_asked_in_a_process() -> None:
    assert tiers() == llaisys.isas()


def test_plan_selects() -> None:
    assert {(j.op, j.dtype) for j in plan(["rope", "add"], ["f16"], ["scalar"], 3, None)} == {
        ("rope", "f16"),
        ("add", "f16"),
    }
    assert all(j.threads == (3,) for j in plan(["rope"], [], ["scalar"], 3, None))
    with pytest.raises(InvalidArgumentError, match="op: expected one of add, .* found 'no_such_op'"):
        plan(["no_such_op"], [], ["scalar"], None, None)


# ------------------------------------------------------------------- faults


def faults(found: list[Result]) -> list[Result]:
    assert found
    return [r for r in found if r.outcome == "fault"]


def test_a_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(outputs: tuple[Array, ...], values: Mapping[str, Any], where: str) -> None:
        if outputs[0].size:
            outputs[0].flat[-1] *= 1.1

    broken(monkeypatch, change)
    found = results("swiglu")
    assert len(faults(found)) > 10 and all("elements out of bound, worst at" in r.text for r in faults(found))


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("layout odd", "layout odd: out: 1 of"),
        ("row 1 alone", "row 1 alone: out: 1 of"),
        ("3 threads", "3 threads: out: 1 of"),
        ("out in the memory of gate", "out in the memory of gate: out: 1 of"),
    ],
)
def test_other_bits_in_another_way(monkeypatch: pytest.MonkeyPatch, where: str, text: str) -> None:
    def change(outputs: tuple[Array, ...], values: Mapping[str, Any], now: str) -> None:
        if now == where and outputs[0].size:
            outputs[0].flat[0] = np.nextafter(outputs[0].flat[0], np.asarray(np.inf, outputs[0].dtype))

    broken(monkeypatch, change)
    assert any(r.text.startswith(text) and "expected" in r.text for r in faults(results("swiglu")))


def test_ties_of_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way cases of linear, rounded to odd: within the bound, but the sum is exact and so must the bits be."""

    def change(outputs: tuple[Array, ...], values: Mapping[str, Any], where: str) -> Any:
        (out,) = outputs
        if out.size != 5 * 33:
            return None
        exact = np.asarray(values["x"], np.float64) @ np.asarray(values["weight"], np.float64).T
        if values["bias"] is not None:
            exact = exact + np.asarray(values["bias"], np.float64)
        other = np.nextafter(out, np.where(out < exact, np.inf, -np.inf).astype(out.dtype))
        tie = np.abs(other.astype(np.float64) - exact) == np.abs(out.astype(np.float64) - exact)
        return (np.where(tie, other, out),)

    broken(monkeypatch, change)
    (fault,) = faults(results("linear"))
    assert fault.case == "small-integers" and "computes this exactly" in fault.text


def test_bytes_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that writes an element too many, in memory that happens to be there."""
    right = harness.invoke

    def invoke(spec: Spec, values: Mapping[str, Any]) -> tuple[str, str]:
        status = right(spec, values)
        view = harness.tensor(values["out"]) if isinstance(values["out"], np.ndarray) else values["out"]
        if view.ndim == 2 and view.strides[0] > view.shape[1]:  # padded: the gap behind the first row
            harness.ctypes.memset(view.data + 2 * view.shape[1], 0, 1)
        return status

    monkeypatch.setattr(harness, "invoke", invoke)
    assert any("bytes around the output out were written to" in r.text for r in faults(results("swiglu")))


def test_a_refused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "invoke", lambda spec, values: ("SHAPE", "swiglu: gate: not today"))
    found = results("swiglu")
    assert faults(found) == found and all("SHAPE: swiglu: gate: not today" in r.text for r in found)


def test_crash_and_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a fault of the case in which it happens, and the cases behind it are checked."""

    def change(outputs: tuple[Array, ...], values: Mapping[str, Any], where: str) -> None:
        if outputs[0].shape == (33,):
            os.kill(os.getpid(), signal.SIGSEGV)
        if outputs[0].shape == (64,):
            time.sleep(60)

    broken(monkeypatch, change)
    found = list(conformance(plan(["swiglu"], ["f32"], ["scalar"], None, None), timeout=2))
    assert [(r.case, r.text) for r in faults(found)] == [
        ("rows33", "crashed with SIGSEGV"),
        ("rows64", "no end within 2 s"),
    ]
    assert found[-1].outcome == "pass" and found[-1].case.endswith(", from two threads")


def test_an_operator_that_always_crashes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda outputs, values, where: os.kill(os.getpid(), signal.SIGKILL))
    found = results("swiglu", "add")
    assert [r.text.startswith("crashed with SIGKILL") for r in found] == [True] * 2 * isolation.CRASHES
    assert sum("is given up" in r.text for r in found) == 2


def test_our_own_errors_are_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*args: Any) -> None:
        raise KeyError("ours")

    broken(monkeypatch, boom)
    with pytest.raises(InternalError, match="(?s)swiglu bf16 scalar: rows0d: .*KeyError"):
        results("swiglu")


def test_failing_cases_are_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def change(outputs: tuple[Array, ...], values: Mapping[str, Any], where: str) -> None:
        if outputs[0].shape == (5, 33):
            outputs[0][4, 32] = 77

    broken(monkeypatch, change)
    (fault,) = faults(results("swiglu", save=str(tmp_path)))
    case = load_case(fault.file)
    assert (case.op, case.isa, case.outputs["out"][4, 32]) == ("swiglu", llaisys.isas()[0], 77)
    assert "rows5x33" in case.site and case.versions["llaisys"] == llaisys.__version__


def test_results_are_plain_data() -> None:
    for result in results("argmax")[:3] + results("swiglu"):
        text = json.dumps(result.as_dict(), allow_nan=False)
        assert json.loads(text)["outcome"] == "pass"
    assert Job("add", "f32", ("scalar",), (1,)).save is None


# ------------------------------------------------------------------ command


def test_command(tmp_path: Path) -> None:
    done = run("check", "rope", "swiglu", "--isa", "scalar", "--json", str(tmp_path / "r.json"))
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "rope" in text and "✓" in text and "keep to the contract" in text and "\x1b" not in text
    assert all(len(line) <= 100 for line in text.splitlines())
    written = json.loads((tmp_path / "r.json").read_text())
    assert {r["op"] for r in written} == {"rope", "swiglu"} and {r["isa"] for r in written} == {"scalar"}


def test_command_at_a_terminal() -> None:
    status, text = at_terminal("check", "add", "--dtype", "f32", "--isa", "scalar", columns=100)
    assert status == 0 and "\x1b[32m✓" in text and "cases keep to the contract" in text


def test_command_on_json_and_errors(tmp_path: Path) -> None:
    done = run("check", "add", "--isa", "scalar", "--json", "-")
    assert {r["outcome"] for r in json.loads(done.stdout)} == {"pass"}
    done = run("check", "no_such_op")
    assert done.returncode == 2 and b"llaisys: error: op: expected one of add," in done.stderr
    done = run("check", "embedding", "--dtype", "f32", "--from", str(tmp_path / "none.npz"))
    assert done.returncode == 2 and b"none.npz: file: expected a trace or case" in done.stderr


def test_command_with_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("no library")
    done = run("check", "add", env={"LLAISYS_LIBRARY": str(tmp_path / "lib.so")})
    assert done.returncode == 2 and b"cannot be loaded" in done.stderr


def test_command_from_a_trace(tmp_path: Path) -> None:
    """The calls of a whole run, certified without the library that made them; a weight of another model is refused."""
    trace = tmp_path / "run.trace"
    done = run("diff", "tiny", "-p", "def f(", "--decode", "1", "--save", str(trace))
    assert done.returncode == 0, done.stderr
    done = run("check", "swiglu", "linear", "--from", str(trace), "--json", "-", env={"LLAISYS_LIBRARY": "/none"})
    found = json.loads(done.stdout)
    assert done.returncode == 0 and {r["op"] for r in found} == {"swiglu", "linear"}
    assert {r["outcome"] for r in found} == {"pass"} and any("step 1, position" in r["case"] for r in found)
    done = run("check", "swiglu", "--from", str(trace), "--model", str(tmp_path))
    assert done.returncode == 2 and b"llaisys: error: " in done.stderr
