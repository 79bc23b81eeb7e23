"""Workers, and the command, in folders that hold modules of their own: those of a stranger, or of the sources."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llaisys import diff
from llaisys._processes import start_worker, worker_command, worker_environment
from llaisys.errors import InternalError
from test_cli import environment

ROOT = Path(__file__).parent.parent
#: The console script, whose sys.path begins with the folder that it is in.
COMMAND = "import sys; sys.path[:] = [x for x in sys.path if x]; from llaisys.__main__ import main; main()"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that leave a mark when they run."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("numpy", "tokenizers", "resource", "runpy", "signal", "llaisys", "json"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", ["", os.pathsep, f".{os.pathsep}{os.pathsep}", None])
def test_a_worker_runs_nothing_of_the_current_folder(
    path: str | None, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path.replace(".", str(ROOT / "tests")))
    report = diff.run_isolated("tiny", "def", 0, context=False)
    assert report.exit_code == 0
    child = start_worker("llaisys", "--version", stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0].startswith("llaisys ") and child.returncode == 0
    assert not (hostile.parent / "ran").exists()


def test_a_worker_keeps_the_users_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "extra_module.py").write_text("import sys; print(sys.argv[1:], __name__)")
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path}{os.pathsep}")
    assert worker_environment(A="b")["PYTHONPATH"] == str(tmp_path) and worker_environment(A="b")["A"] == "b"
    done = subprocess.run(worker_command("extra_module", "x", "y"), env=worker_environment(), capture_output=True)
    assert done.stdout == b"['x', 'y'] __main__\n", done.stderr


def test_all_workers_are_started_so() -> None:
    """`python -m`, but by the one way that leaves the current folder out."""
    for file in (ROOT / "llaisys").rglob("*.py"):
        assert '"-m"' not in file.read_text(), file


def test_a_worker_that_does_not_start_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    (tmp_path / "ml_dtypes.py").write_text("raise RuntimeError('another ml_dtypes')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InternalError, match=r"expected it to start, found that the process ended with status 3"):
        diff.run_isolated("tiny", "x", 0)
    (tmp_path / "sitecustomize.py").unlink()
    with pytest.raises(InternalError, match="expected it to start"):
        diff.run_isolated("tiny", "x", 0)


def test_the_command_where_modules_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = tmp_path / "python"
    starter.write_text("#!/bin/sh\nexit 1\n")
    starter.chmod(0o755)
    code = f"import sys; sys.executable = {str(starter)!r}\n{COMMAND}"
    options = ["diff", "-p", "x", "--decode", "0"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "expected it to start" in done.stderr and "FAULT" not in done.stdout


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_an_interrupted_worker_says_nothing(delay: float) -> None:
    child = start_worker("llaisys", "check", "add", "--dtype", "f32", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    assert child.communicate()[1] == b"" and child.returncode in (-signal.SIGINT, 130)


# ------------------------------------------------------------- source tree


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source tree, and beside it what an installation makes of it, as far as it matters here."""
    for folder in ("tree/llaisys", "site/llaisys"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("__init__.py", "errors.py"):
            shutil.copy(ROOT / "llaisys" / name, tmp_path / folder)
    (tmp_path / "site/llaisys/_build.py").write_text("VERSION = '1.2.3'\n")
    (tmp_path / "site/llaisys/__main__.py").write_text("import llaisys; print(llaisys.__version__, llaisys.errors)\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["-c", "import llaisys; print(llaisys.__version__, llaisys.errors)"], ["-m", "llaisys"]]
)
def test_the_source_tree_gives_way_to_what_is_installed(arguments: list[str], checkout: Path) -> None:
    def run(**env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]  # -S: without an editable installation
        return subprocess.run(command, cwd=checkout / "tree", capture_output=True, text=True, env=env)

    done = run(PYTHONPATH=str(checkout / "site"))
    assert done.stdout.startswith("1.2.3 <") and str(checkout / "site") in done.stdout, done.stderr
    done = run()
    assert done.returncode == 1 and f"found only its sources in {checkout / 'tree'}" in done.stderr
    assert 'pip install ."' in done.stderr


def test_the_installed_package_looks_nowhere_else() -> None:
    code = "import llaisys, json; print(json.dumps([llaisys.__version__, llaisys.reference.__name__]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert json.loads(done.stdout)[1] == "llaisys.reference", done.stderr
