"""The command line, run as its users run it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llaisys
from checkpoints import plain_weights, write_plain
from llaisys.folder import ModelFolder
from llaisys.models import Qwen2

PROMPT = "def fibonacci(n):"


def environment(**changes: str) -> dict[str, str]:
    """Without what the one who runs the tests has set."""
    ours = ("LLAISYS_", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, "LLAISYS_NUM_THREADS": "1", **changes}


def run(*args: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "llaisys", *args]
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, env=environment(**(env or {})), check=False, **options)


def at_terminal(*args: str, columns: int = 80) -> tuple[int, str]:
    """Exit status and all output of a run with stdout and stderr at a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "llaisys", *args],
            environment(TERM="xterm-256color", COLUMNS=str(columns)),
        )
    output = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode()


@pytest.fixture(scope="module")
def expected() -> str:
    model = Qwen2("tiny")
    return model.tokenizer.decode(model.generate(model.tokenizer.encode(PROMPT), 24), skip_special_tokens=True)


# ---------------------------------------------------------------- generate


def test_generate(expected: str) -> None:
    done = run("generate", "-p", PROMPT, "-n", "24")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected + "\n" * (not expected.endswith("\n"))
    assert done.stderr == b""


def test_generate_with_every_backend_and_from_stdin(expected: str) -> None:
    options = ["-n", "24", "--dtype", "bf16", "--threads", "2", "--stats"]
    for more in (["--backend", "reference"], ["--isa", "scalar", "-p", "-"]):
        done = run("generate", "tiny", *options, *more, stdin=None, input=PROMPT.encode())
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().rstrip("\n") == expected.rstrip("\n")
        assert b"prefill" in done.stderr and b"decode 23 tokens" in done.stderr and done.stderr.count(b"\n") == 1


def test_sampling_options() -> None:
    options = ["generate", "-p", PROMPT, "-n", "16", "--temperature", "2", "--top-k", "30", "--top-p", "0.99"]
    one, again, other = (run(*options, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert one == again != other
    assert run(*options, "--seed", "1", "--repetition-penalty", "1.5").returncode == 0


def test_chat_prints_the_answer_only() -> None:
    done = run("generate", "--chat", "-p", "hello there", "-n", "6")
    assert done.returncode == 0, done.stderr
    assert b"hello there" not in done.stdout and b"<|im_" not in done.stdout


def test_no_new_tokens() -> None:
    assert run("generate", "-p", "é\n", "-n", "0").stdout.decode() == "é\n"


def test_characters_come_whole() -> None:
    """Read byte by byte as it streams, the output is never cut inside a character by the writer."""
    command = [sys.executable, "-m", "llaisys", "generate", "-p", "π ≈ 3; é", "-n", "40", "--temperature", "30"]
    for seed in ("1", "2"):
        child = subprocess.Popen([*command, "--seed", seed], stdout=subprocess.PIPE, env=environment())
        assert child.stdout is not None
        while part := os.read(child.stdout.fileno(), 1 << 16):
            part.decode("utf-8")  # each write is whole; a pipe keeps what is written at once together
        child.stdout.close()
        assert child.wait() == 0


def test_a_stdout_that_is_not_unicode() -> None:
    done = run("generate", "-p", "π", "-n", "1", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith(b"?")


def test_at_a_terminal_the_prompt_is_dimmed_and_speed_shown() -> None:
    status, output = at_terminal("generate", "-p", "import \x1b[31mos", "-n", "3")
    assert status == 0
    assert "\033[2mimport \ufffd[31mos\033[0m" in output  # no control character of the text gets through
    assert "decode 2 tokens" in output
    plain = at_terminal("generate", "-p", "import os", "-n", "3", "--no-stats")[1]
    assert "decode" not in plain and "\033[?25l" not in plain


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["nowhere", "-p", "x"], 1, 'nowhere: path: expected a model folder, or "tiny", found no such folder'),
        (["-p", ""], 1, "inputs: expected 1 to 2048 tokens"),
        (["-p", "x", "--top-p", "3"], 1, "top_p"),
        (["-p", "x", "--dtype", "f64"], 2, "--dtype"),
        (["-p", "x", "-n", "-1"], 2, "-n"),
        (["-p", "x", "--threads", "0"], 2, "--threads"),
        (["-p", "x", "--isa", "mmx"], 2, "--isa"),
        (["-p", "x", "--nonsense"], 2, "--nonsense"),
        (["tiny", "more", "-p", "x"], 2, "more"),
    ],
)
def test_errors(args: list[str], status: int, text: str, tmp_path: Path) -> None:
    done = run("generate", *args, cwd=tmp_path)
    assert done.returncode == status
    assert done.stdout == b""
    message = done.stderr.decode()
    assert text in message.replace("\n", "") and "Traceback" not in message
    if status == 1:
        assert message.startswith("llaisys: error: ") and message.count("\n") == 1


def test_an_isa_that_the_machine_lacks() -> None:
    lacking = [name for name in ("avx2", "avx512", "amx") if not llaisys.has_isa(name)]
    if not lacking:
        pytest.skip("this machine has all tiers")
    done = run("generate", "-p", "x", "--isa", lacking[-1])
    assert done.returncode == 1 and lacking[-1].encode() in done.stderr


def test_a_traceback_on_demand(tmp_path: Path) -> None:
    for done in (
        run("--traceback", "generate", "nowhere", "-p", "x", cwd=tmp_path),
        run("generate", "nowhere", "-p", "x", cwd=tmp_path, env={"LLAISYS_DEBUG": "1"}),
    ):
        assert done.returncode == 1 and b"Traceback" in done.stderr and b"llaisys: error: nowhere" in done.stderr


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "m\x1b[31m", weights=plain_weights())
    done = run("generate", str(folder), "-p", "x")
    assert done.returncode == 1 and b"tokenizer.json" in done.stderr and b"\x1b" not in done.stderr


def test_input_that_is_not_utf8() -> None:
    done = run("generate", stdin=None, input=b"ab\xff")
    assert done.returncode == 2 and b"UTF-8" in done.stderr


def test_a_broken_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "llaisys", "generate", "-p", PROMPT, "-n", "200", "--temperature", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(5)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 141


def test_ctrl_c(tmp_path: Path) -> None:
    # The embedded model without end tokens, so that it goes on until it is stopped.
    folder = Path(shutil.copytree(ModelFolder.locate("tiny").root, tmp_path / "endless"))
    for file in (folder / "config.json", folder / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    command = [sys.executable, "-m", "llaisys", "generate", str(folder), "-p", PROMPT, "-n", "2000"]
    command += ["--backend", "reference"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(len(PROMPT) + 1)
    child.send_signal(signal.SIGINT)
    assert child.stderr.read() == b""
    assert child.stdout.read().endswith(b"\n")
    child.stderr.close()
    child.stdout.close()
    assert child.wait() == 130


@pytest.mark.parametrize(
    ("when", "status"),
    [
        ("sys.meta_path.insert(0, Finder())", -signal.SIGINT),
        ("atexit.register(interrupt)", 0),
    ],
    ids=["as modules load", "when all is done"],
)
def test_ctrl_c_before_and_after_the_command(when: str, status: int) -> None:
    """Without a traceback; what was finished counts as finished."""
    code = f"""
import atexit, os, signal, sys
from llaisys.__main__ import main
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(self, *_): interrupt()
{when}
sys.argv = ["llaisys", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False)
    assert done.returncode == status and done.stderr == b""


@pytest.mark.parametrize("command", ["generate -p x", "diff -p x --decode 0", "check add --dtype f32", "--help"])
def test_nobody_reads_the_output(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "llaisys", *command.split()], stdout=write, stderr=subprocess.PIPE, env=environment()
        )
        assert child.communicate()[1] == b"" and child.returncode == 141
    finally:
        os.close(write)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["generate -p x", "doctor", "check add --dtype f32", "--help", "--version"])
def test_stdout_that_takes_nothing(command: str) -> None:
    with Path("/dev/full").open("wb") as full:
        child = subprocess.run(
            [sys.executable, "-m", "llaisys", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert child.returncode == 2
    assert child.stderr == b"llaisys: error: stdout: expected to write to it, found: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    for command, status in (("diff -p x --decode 0 --json r.json", 0), ("generate", 1), ("generate nowhere -p x", 1)):
        line = f"exec {sys.executable} -m llaisys {command} {closed}"
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL, env=environment()
        )
        assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 0


def test_a_table_on_a_stdout_that_is_not_unicode() -> None:
    done = run("diff", "-p", "é", "--decode", "0", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith(b"certified") and done.stderr == b""


@pytest.mark.parametrize("command", ["diff -p x --decode 8", "generate -p x -n 500", "check add"])
def test_ctrl_c_at_any_time(command: str, tmp_path: Path) -> None:
    code = "from llaisys.__main__ import main; print(flush=True); main()"
    for delay in (0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.8):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd=tmp_path,
            start_new_session=True,
        )
        assert child.stdout is not None and child.stdout.read(1) == b"\n"
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        assert child.communicate()[1] == b"", delay
        assert child.returncode in (0, 130, -signal.SIGINT)


# ------------------------------------------------------------ the command


def test_version_and_help() -> None:
    assert run("--version").stdout.decode() == f"llaisys {llaisys.__version__}\n"
    for args in ((), ("--help",), ("generate", "-h"), ("doctor", "-h")):
        done = run(*args)
        assert b"Usage" in done.stdout + done.stderr and done.returncode == (0 if args else 2)
    assert run("nonsense").returncode == 2


def test_the_import_is_light() -> None:
    modules = ("torch", "transformers", "numpy", "tokenizers")
    code = f"import sys, llaisys.cli; print([name for name in {modules} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


# ------------------------------------------------------------------ doctor


def test_doctor() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and report["problems"] == [], report
    library = report["library"]
    assert library["loaded"] and library["works"] and Path(library["path"]).is_file()
    assert library["build"] == library["expected_build"] and library["abi"] == library["expected_abi"]
    assert report["machine"]["isas"] == list(llaisys.isas()) and report["machine"]["isa"] == llaisys.isas()[-1]
    assert report["threads"]["in_use"] == 1
    assert report["versions"]["numpy"] and report["versions"]["python"].startswith("3.")
    text = run("doctor").stdout.decode()
    for part in (library["path"], library["build"], "tier in use", "nothing is wrong"):
        assert part in text.replace("\n                ", "")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_doctor_at_a_terminal(columns: int) -> None:
    status, output = at_terminal("doctor", columns=columns)
    assert status == 0 and "nothing is wrong" in output


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"LLAISYS_LIBRARY": "/nowhere/lib.so"}, "expected a file at /nowhere/lib.so, found none"),
        ({"LLAISYS_LIBRARY": __file__}, "cannot be loaded"),
        ({"LLAISYS_ISA": "mmx"}, "LLAISYS_ISA"),
        ({"LLAISYS_NUM_THREADS": "many"}, "LLAISYS_NUM_THREADS"),
    ],
)
def test_doctor_says_what_is_wrong(changes: dict[str, str], text: str) -> None:
    done = run("doctor", "--json", env=changes)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["ok"]
    assert any(text in problem for problem in report["problems"]), report["problems"]
    assert len(report["problems"]) == 1  # said once
    shown = run("doctor", env={**changes, "COLUMNS": "400"})
    assert shown.returncode == 1 and text in shown.stdout.decode() and b"Traceback" not in shown.stderr


def test_doctor_on_another_library(tmp_path: Path) -> None:
    """A library of something else is refused; one that makes threads wait is only worth a note."""
    import ctypes.util

    other = ctypes.util.find_library("m")
    if other is None:
        pytest.skip("no C library found")
    path = next((p for p in map(Path, ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib")) if (p / other).exists()), None)
    if path is not None:
        report = json.loads(run("doctor", "--json", env={"LLAISYS_LIBRARY": str(path / other)}).stdout)
        assert not report["ok"] and "is no library of this llaisys" in report["problems"][0]
    report = json.loads(run("doctor", "--json", env={"LLAISYS_NUM_THREADS": "999"}).stdout)
    assert report["ok"] and "more threads (999)" in report["notes"][0]
