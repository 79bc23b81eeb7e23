"""Files that are written: whole, or not at all."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from llaisys import diff
from llaisys.case import Case, save_case
from llaisys.commands.common import finish
from llaisys.errors import FileError
from llaisys.export import export
from llaisys.files import check_target, new_file, partial_of, write_text
from test_cli import environment, run

EFBIG = os.strerror(27)


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """As on a disk that is full: no file grows beyond `nbytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def case() -> Case:
    x = np.ones((64, 64), np.float32)
    return Case("add", {"a": x, "b": x}, {}, {"out": x + x})


WRITERS: list[Any] = [
    lambda path: write_text(path, "x" * 9999),
    lambda path: save_case(path, case()),
    lambda path: export("tiny", path),
    lambda path: diff.run("tiny", "x", 0, save=path, context=False),
]


@pytest.mark.parametrize("write", WRITERS, ids=["text", "case", "export", "trace"])
def test_whole_or_not_at_all(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileError, match=rf"{path}: expected a file that can be written, found: {EFBIG}"), limited(4096):
        write(path)
    assert not list(tmp_path.iterdir())
    path.write_text("before")
    path.chmod(0o640)
    with pytest.raises(FileError), limited(4096):
        write(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.stat().st_size > 4096 and list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(FileError, match=rf"nowhere/file: expected .* {os.strerror(2)}"):
        write(tmp_path / "nowhere" / "file")
    with pytest.raises(FileError, match="expected a regular file or none, found a directory"):
        write(tmp_path)


@pytest.mark.parametrize("write", WRITERS[1:], ids=["case", "export", "trace"])
def test_a_pipe_is_not_replaced(write: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: expected a regular file or none, found a pipe or device"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_text_to_a_pipe_and_through_a_link(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    check_target(pipe, devices=True)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "é\udcff")
    reader.join()
    assert found == ["é?"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder/file").read_text() == text
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_file(tmp_path / "file") as stream:
        stream.write(b"x")
        raise KeyError
    assert not list(tmp_path.iterdir())
    partial_of(tmp_path / "file", os.getpid()).write_text("of another process with this number")
    write_text(tmp_path / "file", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_check_target(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere/file", tmp_path):
        with pytest.raises(FileError, match=str(path)):
            check_target(path, devices=True)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "new"):
        check_target(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    "command",
    [
        "diff -p x --decode 0 --json {}",
        "diff -p x --decode 0 --html {}",
        "diff -p x --decode 0 --save {}",
        "check --json {}",
        "bench --json {}",
        "bench --plot {}.svg",
        "selftest --json {}",
    ],
)
def test_a_target_is_tried_before_the_work(command: str, tmp_path: Path) -> None:
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    done = run(*command.format("nowhere/file").split(), cwd=tmp_path)
    assert done.returncode == (1 if command.startswith("bench") else 2) and done.stdout == b""
    assert b"nowhere/file" in done.stderr and b"expected a file that can be written, found: No such" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("status", [0, 1])
def test_reports_that_fail(status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They take no verdict away, and the others are written."""
    with pytest.raises(typer.Exit) as end, limited(4096):
        finish(status, (tmp_path / "a", lambda: "x" * 9999), (Path("-"), lambda: "y"), (tmp_path / "b", lambda: "z"))
    assert end.value.exit_code == (status or 2) and [path.name for path in tmp_path.iterdir()] == ["b"]
    out, error = capsys.readouterr()
    assert out == "y\n" and error.endswith(f"{tmp_path / 'a'}: expected a file that can be written, found: {EFBIG}\n")


def test_a_verdict_is_told_before_a_report_fails(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report")
    reader = threading.Thread(target=lambda: (tmp_path / "report").open("rb").close())
    reader.start()
    done = run("diff", "-p", "x", "--decode", "9", "--json", "report", cwd=tmp_path)  # more than a pipe holds
    reader.join()
    assert done.returncode == 2 and done.stdout.startswith(b"certified")
    assert done.stderr == b"llaisys: error: report: expected a file that can be written, found: Broken pipe\n"


def test_reports_to_stdout_by_name(tmp_path: Path) -> None:
    """/dev/stdout is a pipe, or a file whose beginning is there already."""
    options = ["diff", "-p", "x", "--decode", "0", "--json", "/dev/stdout"]
    piped = run(*options).stdout
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-m", "llaisys", *options], stdout=out, env=environment(), check=True)
    written = (tmp_path / "out").read_bytes()
    for text in (piped, written):
        assert text.startswith(b"certified") and text.endswith(b"}\n") and b'"exit_code": 0' in text
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_leaves_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llaisys", "diff", "-p", "x", "--decode", "1500", "--save", "t"]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    end = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    assert list(tmp_path.iterdir())
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate()[1] == b"" and child.returncode == 130 and not list(tmp_path.iterdir())
