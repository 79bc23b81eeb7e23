"""The documentation holds: its Python runs, its commands run, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def commands(page: Path) -> list[str]:
    lines = (line for _, block in blocks(page, "sh") for line in block.splitlines())
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page(page: Path, tmp_path: Path) -> None:
    """All blocks in one program, on the lines that they have in the page, so that a traceback names those."""
    pytest.importorskip("torch")
    program = ""
    for line, code in blocks(page, "python"):
        program += "\n" * (line - 1 - program.count("\n")) + code
    path = tmp_path / f"{page.stem}.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, path.name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for code in re.findall(r"^ *print\(.*  # (\w+: .*)$", program, re.M):
        assert code in done.stdout  # what the page says that is printed


def quick(command: str) -> bool:
    """Not the benchmarks, which take minutes; tests/test_bench.py runs those with small cases."""
    return command.startswith("llaisys ") and not command.startswith(("llaisys bench", "llaisys selftest"))


@pytest.mark.parametrize("command", [c for page in PAGES for c in commands(page) if quick(c)])
def test_commands(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_two_commands() -> None:
    """The set-up is these two; .ci/run goes the way of the second."""
    found = commands(README)
    assert found[:4] == [
        "pip install .",
        'llaisys generate -p "def fibonacci(n):" -n 64',
        'pip install ".[test]"',
        "pytest",
    ]
    script = (ROOT / ".ci/run").read_text()
    assert 'pip install --quiet --progress-bar off ".[test]"\n' in script and "\npytest " in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:kernels|reference|tests|benchmarks|tools|llaisys)/[\w/.-]+)`", text):
        assert "relu" in path or (ROOT / path).exists(), path
