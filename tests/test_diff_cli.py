"""`llaisys diff` and `llaisys trace-diff`, run as their users run them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llaisys import diff
from test_cli import at_terminal, environment

PROMPT = "def f(x):\n    return"


def run(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llaisys", *args]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**env), cwd=cwd, check=False, stdin=subprocess.DEVNULL
    )


def test_certified(tmp_path: Path) -> None:
    done = run("diff", "-p", PROMPT, "--decode", "2", "--json", "r.json", "--html", "r.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("certified: 189 nodes; the largest error is ") and not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100 and "\x1b" not in done.stdout
    report = diff.Report.from_json((tmp_path / "r.json").read_text())
    assert report.exit_code == 0 and len(report.nodes) == 189
    assert "<html" in (tmp_path / "r.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_json_on_stdout() -> None:
    done = run("diff", "-p", PROMPT, "--decode", "0", "--json", "-", "--dtype", "f32", "--threads", "2")
    assert done.returncode == 0 and json.loads(done.stdout)["dtype"] == "f32"


def test_tokens_from_a_file_and_swaps(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("[1, 2,\n 3] 4")
    options = ["--tokens", "tokens", "--decode", "1", "--swap", "layers.1.*=reference", "--swap", "rope=reference"]
    done = run("diff", "tiny", *options, "--json", "r.json", "--max-memory", "2G", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = diff.Report.from_json((tmp_path / "r.json").read_text())
    assert report.prompt == [1, 2, 3, 4] and report.swaps == {"layers.1.*": "reference", "rope": "reference"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["nowhere", "-p", "x"], "nowhere"),
        (["-p", "x", "--swap", "rope"], "--swap: expected SITE=reference"),
        (["-p", "x", "--swap", "nothing=reference"], "matches nothing"),
        (["-p", "x", "--max-memory", "much"], "--max-memory: expected a size"),
        (["--tokens", "nowhere"], "--tokens: expected a file"),
        (["--tokens", "many"], f"--tokens: expected token ids in many, found '{'9' * 40}...'"),
        (["--tokens", "big"], "tokens[1]: expected a token from 0 to "),
        (["-p", "x", "--oracle", "gguf"], "oracle: expected"),
        (["-p", "x", "--save", "nowhere/t.trace"], "nowhere"),
    ],
)
def test_errors_are_no_verdict(options: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "many").write_text("1 " + "9" * 5000)
    (tmp_path / "big").write_text(f"[1, {10**17}]")
    done = run("diff", *options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("llaisys: error: ") and text in done.stderr
    assert "Traceback" not in done.stderr


def test_neither_or_both_prompts() -> None:
    assert run("diff").returncode == 2
    assert run("diff", "-p", "x", "--tokens", "y").returncode == 2


def test_progress_at_a_terminal() -> None:
    status, output = at_terminal("diff", "-p", PROMPT, "--decode", "1", columns=90)
    assert status == 0 and "certified" in output and "\x1b[" in output


#: Put before the worker's own start: the library under test is changed from within, as no other compiler is at hand.
FAULTY = """
import os, signal, sys, time
from llaisys import ops
from llaisys.models import qwen2, native
import llaisys.diff.worker as worker

true_show = native._Tap._show
def show(self, address):
    from llaisys._lib import LlaisysNode
    node = LlaisysNode.from_address(address)
    if node.site == b"model.layers.2.mlp.gate_proj" and node.position >= 9:
        {what}
    true_show(self, address)
native._Tap._show = show
worker.main()
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the worker do something at a node."""

    def arrange(what: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(FAULTY.format(what=what))
        starter = tmp_path / "python"
        starter.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
        starter.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(starter))

    return arrange


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process died of SIGSEGV"),
        ("os.abort()", "the process died of SIGABRT"),
        ("os._exit(3)", "the process ended with status 3"),
        ("time.sleep(60)", "no sign of life for 3 s"),
    ],
)
def test_a_crash_is_a_fault_of_its_node(faulty: Any, what: str, text: str) -> None:
    faulty(what)
    report = diff.run_isolated("tiny", "def f(x):\n    return x + 1", 2, patience=3.0)
    assert report.exit_code == 1
    (fault,) = report.faults
    assert text in fault.message
    assert fault.site == "model.layers.2.mlp.gate_proj", fault.message


@pytest.mark.parametrize("scene", ["the engine without taps", "llaisysQwen2ModelInfer"])
def test_a_crash_where_nobody_watches(scene: str) -> None:
    """No node was told to run, so that none is blamed."""
    from llaisys.diff.isolated import _ended

    (fault,) = _ended({"model": "tiny", "decode": 1}, (scene, 0, ""), "the process died of SIGSEGV", 0.0).faults
    assert (fault.site, fault.op) == ("the engine without taps", "forward")
    assert fault.message == f"the process died of SIGSEGV in {scene}"


def test_a_fault_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of a fault, from a run within this process."""
    from llaisys import ops
    from llaisys.diff.text import print_report

    def late(x: Any, pos_ids: Any, theta: float) -> Any:
        return ops.rope(x, pos_ids + 1, theta)

    report = diff.run("tiny", PROMPT, 2, swap={"layers.2.self_attn.rope_k": late}, reproducers=tmp_path / "faults")
    print_report(report)
    out = capsys.readouterr().out
    first, *lines, last = out.splitlines()
    assert max(map(len, lines)) <= 100 and last.startswith("next  llaisys replay ")  # which is to be copied whole
    assert first == "FAULT: LOCAL of model.layers.2.self_attn.rope_k, the prompt, position 0"
    for text in (
        "certificate  LOCAL, the output is not what the operator makes of its inputs",
        "hypothesis   position offset +1",
        "upstream     layers.2.self_attn.k_proj certified",
        "swap         with the reference's rope at this site the fault is gone",
        "reproducer   ",
        "next  llaisys replay ",
    ):
        assert text in out, out
    assert report.faults[0].reproducer is not None and Path(report.faults[0].reproducer).is_file()


@pytest.mark.parametrize("prompt", ["it's a test", PROMPT, "-x"])
def test_the_next_command_can_be_copied(prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is one line, whatever the prompt, and runs the same tokens again."""
    from dataclasses import replace

    from llaisys.diff.text import next_command, print_report

    report = diff.run("tiny", prompt, 1, context=False)
    fault = diff.Fault("model.layers.2.mlp.act", "swiglu", 0, 0, "EDGE", "made up")
    report.faults = [fault]
    command = next_command(report)
    print_report(report)
    assert capsys.readouterr().out.splitlines()[-1] == f"next  {command}"
    command = command.replace("llaisys diff", f"{sys.executable} -m llaisys diff", 1) + " --json r.json"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False
    )
    assert done.returncode == 0, (command, done.stderr)
    again = diff.Report.from_json((tmp_path / "r.json").read_text())
    assert (again.prompt, again.decode, again.dtype) == (report.prompt, 1, "bf16")
    assert again.swaps == {"model.layers.2.mlp.act": "reference"}
    # Nothing that a swap could reach; an operator that is no node.
    report.faults = [replace(fault, site="the engine without taps", op="forward", certificate="REPEAT")]
    assert next_command(report) == ""
    report.faults = [replace(fault, site="argmax", op="argmax", certificate="LOCAL")]
    assert next_command(report) == "llaisys check argmax --dtype bf16"


def test_all_layers_are_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    from llaisys import ops
    from llaisys.diff.text import print_report

    report = diff.run("tiny", PROMPT, 1, swap={"rope": lambda x, pos, theta: ops.rope(x, pos, theta * 2)})
    print_report(report)
    assert "rope_k in 5 of 5 layers (LOCAL)" in capsys.readouterr().out


def test_trace_diff(tmp_path: Path) -> None:
    options = ["diff", "-p", PROMPT, "--decode", "1"]
    assert run(*options, "--save", "a.trace", cwd=tmp_path).returncode == 0
    assert run(*options, "--save", "b.trace", "--dtype", "f32", cwd=tmp_path).returncode == 0
    done = run("trace-diff", "a.trace", "a.trace", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("the same bits throughout")
    done = run("trace-diff", "a.trace", "b.trace", "--json", "c.json", cwd=tmp_path)
    assert done.returncode == 0 and "differ in storage type: bf16 and f32" in done.stdout, done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["exit_code"] == 0
    done = run("trace-diff", ".", "a.trace", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "llaisys: error: .: file: expected a regular file, found another\n"
    (tmp_path / "bad.trace").write_bytes(b"no trace")
    done = run("trace-diff", "a.trace", "bad.trace", cwd=tmp_path)
    assert done.returncode == 2 and "bad.trace: file: expected a trace" in done.stderr
    assert run("trace-diff", "a.trace", "none.trace", cwd=tmp_path).returncode == 2


def test_the_public_functions_are_documented() -> None:
    for function in (diff.run, diff.run_isolated):
        assert function.__doc__ and "Raises" in textwrap.dedent(function.__doc__)
