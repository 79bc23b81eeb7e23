"""Builds libraries from patched copies of the kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .._processes import worker_command, worker_environment
from ..errors import InvalidArgumentError, LibraryError

#: What a build of the library reads.
_PARTS = ("kernels", "reference", "tools", "llaisys", "meson.build", "meson.options", "pyproject.toml", "LICENSE")
_TESTS = "tests/ops"  # meson.build asks whether each operator has its test


@dataclass(frozen=True)
class Patch:
    """In `file`, the one occurrence of `old` becomes `new`."""

    file: str
    old: str
    new: str


#: The gate of all faults: nodes outside of layer `llaisysMutantLayer` are right, unless it is -1. The engine sets
#: `llaisysMutantOn` before each node; calls of operators outside of it are wrong in the latter case only.
GATE = (
    Patch(
        "kernels/core/status.h",
        "#pragma once\n",
        '#pragma once\n#include "mutant.h"\n',
    ),
    Patch(
        "kernels/core/tier.h",
        "#pragma once\n",
        '#pragma once\n#include "mutant.h"\n',
    ),
    Patch(
        "kernels/core/status.cpp",
        '#include "status.h"\n',
        '#include "status.h"\n\nextern "C" {\nint llaisysMutantLayer = -1;\nint llaisysMutantOn = 1;\n}\n',
    ),
    Patch(
        "kernels/models/qwen2.cpp",
        "        const Layer &w = model_.layers[i];\n",
        "        const Layer &w = model_.layers[i];\n"
        "        llaisysMutantOn = llaisysMutantLayer < 0 || llaisysMutantLayer == int(i);\n",
    ),
    Patch(
        "kernels/models/qwen2.cpp",
        "    model_.tokens_computed += count;\n",
        "    llaisysMutantOn = llaisysMutantLayer < 0;\n    model_.tokens_computed += count;\n",
    ),
    Patch(
        "kernels/models/qwen2.cpp",
        "    positions.resize(size_t(T));\n",
        "    llaisysMutantOn = llaisysMutantLayer < 0;\n    positions.resize(size_t(T));\n",
    ),
)
_HEADER = """#pragma once

extern "C" {
extern __attribute__((visibility("default"))) int llaisysMutantLayer;
extern __attribute__((visibility("default"))) int llaisysMutantOn;
}
#define MUTANT (llaisysMutantOn != 0)
"""


def source_tree(folder: Path | None = None) -> Path:
    """The folder with the sources of the library: `folder`, or the current one. InvalidArgumentError if it is none."""
    tree = (folder or Path.cwd()).resolve()
    missing = [part for part in ("kernels/llaisys.h", "meson.build") if not (tree / part).is_file()]
    if missing:
        raise InvalidArgumentError(
            f"source: expected a folder with the sources of llaisys (a checkout), found none of {', '.join(missing)} "
            f"in {tree}"
        )
    return tree


class Builder:
    """A copy of the sources in `folder`, with the gate in it, and one build of it that every fault starts from."""

    def __init__(self, source: Path, folder: Path, compiler: tuple[str, str] | None = None) -> None:
        self.tree, self._build, self._compiler = folder / "tree", folder / "build", compiler
        self.tree.mkdir(parents=True)
        for part in _PARTS:
            path = source / part
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
                shutil.copytree(path, self.tree / part, ignore=ignore)
            elif path.is_file():
                shutil.copy2(path, self.tree / part)
        shutil.copytree(source / _TESTS, self.tree / _TESTS)
        (self.tree / "kernels/core/mutant.h").write_text(_HEADER)
        for patch in GATE:
            self._apply(patch)

    def prepare(self, options: tuple[str, ...] = ()) -> Path:
        """Configure and build the copy without a fault; returns the library, which is the clean control."""
        environment = worker_environment()
        if self._compiler:
            environment["CC"], environment["CXX"] = self._compiler
        # By way of this interpreter: its environment may not be activated.
        meson = worker_command("mesonbuild.mesonmain")
        environment.setdefault("NINJA", _ninja())
        self._run([*meson, "setup", str(self._build), str(self.tree), "-Dwerror=false", *options], environment)
        return self._make()

    def mutate(self, patches: tuple[Patch, ...], library: Path) -> Path:
        """Build the copy with `patches`, put the result at `library`, and take the patches out again."""
        before = {patch.file: (self.tree / patch.file).read_text() for patch in patches}
        try:
            for patch in patches:
                self._apply(patch)
            shutil.copy2(self._make(), library)
        finally:
            for file, text in before.items():
                (self.tree / file).write_text(text)
        return library

    def _apply(self, patch: Patch) -> None:
        path = self.tree / patch.file
        text = path.read_text()
        count = text.count(patch.old)
        if count != 1:
            raise InvalidArgumentError(
                f"{patch.file}: expected to find the text to patch once, found it {count} times: {patch.old!r}"
            )
        path.write_text(text.replace(patch.old, patch.new))

    def _make(self) -> Path:
        self._run([_ninja(), "-C", str(self._build), "libllaisys.so"], None)
        return self._build / "libllaisys.so"

    @staticmethod
    def _run(command: list[str], environment: dict[str, str] | None) -> None:
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise LibraryError(f"{command[0]}: expected this program to build with, found none") from None
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise LibraryError(f"{command[0]}: {errors[0] if errors else 'failed'}")


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"
