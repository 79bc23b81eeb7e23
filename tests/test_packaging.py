"""What gets installed: files, versions, and an import that is quick and asks for no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llaisys

ROOT = Path(__file__).parent.parent


def run(code: str, folder: Path) -> str:
    """What `code` prints in a fresh interpreter, in a folder that has no llaisys of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_editable() -> bool:
    text = importlib.metadata.distribution("llaisys").read_text("direct_url.json")
    return bool(json.loads(text or "{}").get("dir_info", {}).get("editable"))


def sources(folder: str) -> set[str]:
    paths = (ROOT / folder).rglob("*")
    return {p.relative_to(ROOT / folder).as_posix() for p in paths if p.is_file() and p.parent.name != "__pycache__"}


def test_one_version_everywhere() -> None:
    (meson,) = re.findall(r"^  version: '([^']+)'", (ROOT / "meson.build").read_text(), re.M)
    (pyproject,) = re.findall(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    versions = {meson, pyproject, llaisys.__version__, importlib.metadata.version("llaisys")}
    assert versions == {meson}


def test_the_package_has_its_files() -> None:
    package = importlib.resources.files("llaisys")
    for name in ("libllaisys.so", "include/llaisys.h"):
        assert package.joinpath(*name.split("/")).is_file() or is_editable(), name
    tiny = package.joinpath("data", "tiny")
    names = {path.name for path in tiny.iterdir()}
    assert package.joinpath("py.typed").is_file()  # else type checkers see nothing of the annotations
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert len(tiny.joinpath("model.safetensors").read_bytes()) <= 10_000_000


@pytest.mark.skipif(is_editable(), reason="an editable installation has no list of its files")
def test_the_wheel_has_all_of_the_packages_and_nothing_else() -> None:
    files = {f.as_posix() for f in importlib.metadata.files("llaisys") or () if "__pycache__" not in f.parts}
    found = {f for f in files if not f.split("/")[0].endswith(".dist-info") and not f.endswith("bin/llaisys")}
    expected = {f"llaisys/{name}" for name in sources("llaisys")}
    expected |= {f"llaisys/reference/{name}" for name in sources("reference")}
    expected |= {"llaisys/_build.py", "llaisys/libllaisys.so", "llaisys/include/llaisys.h"}
    assert found == expected
    assert any(f.endswith("/LICENSE") for f in files)
    assert not any(f.startswith("reference/") for f in files)


def test_run_time_needs_no_test_packages() -> None:
    requirements = importlib.metadata.requires("llaisys") or []
    plain = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements if "extra ==" not in line}
    assert plain == {"numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "typer", "rich"}


def test_import_is_quick_and_leaves_torch_alone(tmp_path: Path) -> None:
    code = (
        "import time; t = time.process_time(); import llaisys, sys; t = time.process_time() - t\n"
        "assert 'torch' not in sys.modules\n"
        "llaisys.ops.add, llaisys.Qwen2, llaisys.reference.rope, llaisys.isa()\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules), sorted(sys.modules)\n"
        "print(t)"
    )
    # The time of the processor, as another process may have the other; the best of three, as the first one may compile.
    assert min(float(run(code, tmp_path)) for _ in range(3)) < 0.5


def test_module_and_command_are_one_program(tmp_path: Path) -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="llaisys")
    assert command.value == "llaisys.__main__:main"
    done = subprocess.run(
        [sys.executable, "-m", "llaisys", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"llaisys {llaisys.__version__}\n", done.stderr
