"""The amx tier on machines without tiles: a library that emulates its tile instructions goes through the tests."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llaisys

ROOT = Path(__file__).parent.parent


def test_emulated_tiles(tmp_path: Path) -> None:
    if platform.machine() != "x86_64" or not llaisys.has_isa("avx512"):
        pytest.skip("the kernels of the amx tier use AVX-512 beside tiles, which this machine has not")
    if llaisys.has_isa("amx"):
        pytest.skip("this machine has tiles: the other tests run in the amx tier")
    if missing := [name for name in ("c++", "meson", "ninja") if shutil.which(name) is None]:
        pytest.skip(f"the emulation is built here, but {', '.join(missing)} is not installed")

    def run(*command: object, library: Path | None = None) -> str:
        given = {"LLAISYS_LIBRARY": str(library)} if library else {}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **given})
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
        return done.stdout

    run("meson", "setup", "-Damx=emulated", tmp_path / "build", ROOT)
    run("ninja", "-C", tmp_path / "build", "libllaisys.so")
    library = tmp_path / "build" / "libllaisys.so"
    code = "import llaisys; print(llaisys.isa())"
    if run(sys.executable, "-c", code, library=library).strip() != "amx":
        pytest.skip("the kernels of the amx tier use AVX512_BF16 beside tiles, which this machine has not")
    names = ("ops/test_linear", "ops/test_self_attention", "ops/test_rope_self_attention", "test_invariance")
    tests = [ROOT / f"tests/{name}.py" for name in (*names, "test_model_logits")]
    chosen = "amx and (bf16 or f16) and (linear or Linear or Attention) or guarded or test_logits"
    # pytest's faulthandler would take the signal of an illegal instruction for itself.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", chosen]
    found = run(sys.executable, "-m", "pytest", *options, *tests, library=library)
    passed = re.search(r"(\d+) passed", found)
    assert passed and int(passed[1]) >= 20, found[-500:]
