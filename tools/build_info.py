"""Write the build hash into build_info.c and _build.py: `build_info.py VERSION OUT SOURCE`.

The hash covers every file under kernels/ and meson.build. Files are only rewritten when it changes, so that a build
that changed nothing stays one.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path


def build_hash(source: Path) -> str:
    """Hex digest over the names and contents of what the library is built from."""
    digest = hashlib.sha256()
    for path in [source / "meson.build", *sorted((source / "kernels").rglob("*"))]:
        if path.is_file():
            digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def main() -> None:
    version, out, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    found = re.search(r"#define LLAISYS_ABI_VERSION (\d+)", (source / "kernels/llaisys.h").read_text())
    if found is None:
        raise SystemExit("kernels/llaisys.h: expected a line '#define LLAISYS_ABI_VERSION n', found none")
    text = build_hash(source)
    files = {
        "build_info.c": f'#include "llaisys.h"\n\nconst char *llaisysBuildHash(void) {{ return "{text}"; }}\n',
        "_build.py": '"""What the native library of this installation must be. Written by the build."""\n\n'
        f'VERSION = "{version}"\nABI_VERSION = {found[1]}\nBUILD_HASH = "{text}"\n',
    }
    for name, content in files.items():
        path = out / name
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


if __name__ == "__main__":
    main()
