"""Run mypy over the packages, laid out as they are installed: `reference/` is `llaisys/reference` there.

Further arguments are passed on to mypy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out(folder: Path) -> list[str]:
    """Links to all that is checked, in `folder`; returns the names in it."""
    (folder / "llaisys").mkdir()
    for path in (ROOT / "llaisys").iterdir():
        (folder / "llaisys" / path.name).symlink_to(path)
    (folder / "llaisys/reference").symlink_to(ROOT / "reference")
    for name in ("benchmarks", "tools"):
        (folder / name).symlink_to(ROOT / name)
    return ["llaisys", "benchmarks", "tools"]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="llaisys-mypy-") as name:
        checked = lay_out(Path(name))
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        command = [sys.executable, "-m", "mypy", *options, *sys.argv[1:], *checked]
        # The error messages name files from here on, as in the tree but for llaisys/reference.
        return subprocess.run(command, cwd=name, env={**os.environ, "MYPYPATH": "benchmarks"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
