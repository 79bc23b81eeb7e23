"""The examples do what they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, directory: Path, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_find_bad_layer(tmp_path: Path) -> None:
    """The wrong rope is found at its own site, and only there, and named."""
    out = run("find_bad_layer.py", tmp_path, status=1)
    _, by_node = out.split("nodes whose output")
    wrong, differ = by_node.split("the differ:")
    assert [line.split()[0] for line in wrong.splitlines()[1:]] == ["model.layers.2.self_attn.rope_k"]
    assert "model.layers.2.self_attn.rope_k, LOCAL" in differ
    assert "hypothesis: position offset +1" in differ


def test_watch_activations(tmp_path: Path) -> None:
    """A line for each block; the script itself asserts that its last line is what the model says."""
    out = run("watch_activations.py", tmp_path)
    lines = out.splitlines()[1:]
    assert len(lines) == 2 * 5 and lines[0].startswith("layer 0 attention") and lines[-1].startswith("the last mlp")
    assert all(float(line.split("attention")[-1].split("mlp")[-1].split()[0]) > 0 for line in lines)
