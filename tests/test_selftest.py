"""The self-test of the differ: that faults are built and judged as they should be, and a few of them for real."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llaisys.errors import InternalError, InvalidArgumentError
from llaisys.selftest import rules
from llaisys.selftest import run as running
from llaisys.selftest.build import GATE, Builder, Patch, source_tree
from llaisys.selftest.mutants import LEGAL, MUTANTS
from llaisys.selftest.run import Case, Plan, expected_sites, run
from llaisys.selftest.summary import DIFFER, FIRST, misses, summarise

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def case(fault: str | None, site: str | None = None, certificate: str = "LOCAL", **answer: Any) -> Case:
    job = {"layers": 5, "layer": 2, "dtype": "bf16", "isa": "scalar", "threads": 1}
    blamed = [[site, certificate, 0, None, ""]] if site else []
    others: dict[str, Any] = {"rules": dict.fromkeys(rules.RULES), "largest": [[0, "model.norm", 0.25]]}
    return Case(BY_NAME[fault] if fault else None, fault or "clean", job, {"faults": blamed, **others, **answer})


def test_every_fault_fits_the_sources() -> None:
    """Each text to patch is found once: kernels that change take their faults along."""
    for mutant in (*MUTANTS, *LEGAL):
        for patch in mutant.patches:
            if patch.old in "".join(other.new for other in mutant.patches if other is not patch):
                continue
            text = (ROOT / patch.file).read_text()
            assert text.count(patch.old) == 1 or "llaisysMutantLayer" in patch.old, f"{mutant.name}: {patch.old!r}"
    for patch in GATE:
        assert (ROOT / patch.file).read_text().count(patch.old) == 1, patch.old


def test_there_are_enough_faults_of_each_kind() -> None:
    assert len(MUTANTS) >= 30 and len(BY_NAME) == len(MUTANTS)
    assert {name for mutant in MUTANTS for name in mutant.certificates} == {"LOCAL", "EDGE", "PARAM", "STATE", "REPEAT"}


def test_sites_that_are_right_to_blame() -> None:
    residual = BY_NAME["residual-not-kept"]
    assert expected_sites(residual, {"layers": 5, "layer": 4}) == {
        "model.layers.4.post_attention_layernorm",
        "model.norm",
    }
    assert expected_sites(BY_NAME["swiglu-swapped"], {"layers": 5, "layer": -1}) == {"model.layers.0.mlp.act"}
    assert expected_sites(BY_NAME["embedding-next-row"], {"layers": 5, "layer": -1}) == {"model.embed_tokens"}


def test_summary() -> None:
    right = "model.layers.2.mlp.act"
    cases = [
        case("swiglu-swapped", right),
        case("swiglu-swapped", "model.layers.1.mlp.act"),
        case("swiglu-swapped", right, "EDGE"),
        case("swiglu-swapped"),
        case("swiglu-swapped", check=True),
        case("swiglu-swapped", error="crashed"),
        case(None),
        case(None, "lm_head", largest=[[0, "model.norm", 0.125]]),
    ]
    rows = {row.rule: row for row in summarise(cases)}
    differ = rows[DIFFER]
    assert (differ.faults, differ.detected, differ.named, differ.certificates) == (6, 5, 3, 3)
    assert (differ.controls, differ.alarms) == (2, 1)
    # Calibrated to the clean runs, 0.25 is no deviation.
    assert rows[FIRST].detected == 1 and rows[FIRST].alarms == 0
    assert [c.answer["faults"] for c in misses(cases)].count([]) == 2 and len(misses(cases)) == 4


def test_rules_measure() -> None:
    import numpy as np

    a, b = np.array([1.0, 2.0, -4.0]), np.array([1.0, 2.0, -4.5])
    (found,) = rules.deviations([(0, "x", a)], [(0, "x", b)])
    assert found.largest == 0.5 / 4.5 and found.outside
    assert found.nmse == 0.25 / 25.25 and 0 < found.cosine < 1e-2
    (found,) = rules.deviations([(0, "x", a * np.nan)], [(0, "x", b)])
    assert found.nmse == np.inf and all(rule(found) for rule in rules.RULES.values())


def test_patches_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a folder with the sources"):
        source_tree(tmp_path)
    builder = Builder(source_tree(ROOT), tmp_path / "build")
    patches = (Patch("kernels/ops/add.cpp", "no such text", ""),)
    before = (builder.tree / "kernels/ops/add.cpp").read_text()
    with pytest.raises(InvalidArgumentError, match="found it 0 times"):
        builder.mutate(patches, tmp_path / "x.so")
    assert (builder.tree / "kernels/ops/add.cpp").read_text() == before


def test_list() -> None:
    done = subprocess.run([sys.executable, "-m", "llaisys", "selftest", "--list"], capture_output=True, text=True)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == list(BY_NAME)


def answers(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What becomes of two jobs in processes that run `script` in the place of the worker."""
    worker = folder / "worker"
    worker.write_text(f"#!/bin/sh\nread job\n{script}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr(running, "_PATIENCE", 0.5)
    cases = [case("keys-to-another-layer"), case("keys-to-another-layer")]
    return running._answer(folder / "fault.so", cases, lambda case: None, threading.Event())


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("kill -SEGV $$", "the process died of SIGSEGV"),
        ("kill -ABRT $$", "the process died of SIGABRT"),
        ("exec sleep 60", "the process gave no answer for 0.5 s"),
    ],
)
def test_a_fault_that_ends_the_process_is_found(
    script: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = answers(f"echo '\"running\"'; {script}", tmp_path, monkeypatch)
    assert [c.answer for c in cases] == [{"error": text}] * 2 and all(c.alarmed for c in cases)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo no such module >&2; exit 1", "ended with status 1 before the library .* compute: no such module"),
        ("kill -SEGV $$", "died of SIGSEGV before the library had anything to compute"),
        ("exec sleep 60", "gave no answer for 0.5 s before"),
        ("echo '\"running\"'; kill -KILL $$", "died of SIGKILL in the midst of a job"),
        ("echo '\"running\"'; exit 0", "ended with status 0 in the midst of a job"),
        ("echo '\"running\"'; printf '{\"faults'; exit 1", "ended with status 1 in the midst of a job"),
    ],
)
def test_a_process_that_could_not_run_finds_nothing(
    script: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InternalError, match=f"^fault: the process {text}"):
        answers(script, tmp_path, monkeypatch)


def test_a_library_that_cannot_be_used_is_no_fault_that_was_found(tmp_path: Path) -> None:
    jobs = running.Jobs(Plan(mutants=(), controls=1)).controls(1)
    cases = [Case(BY_NAME["rope-sign"], "rope-sign", job) for job in jobs]
    with pytest.raises(InternalError, match=r"^none: the process ended with status 1 .*LibraryError: .* is missing"):
        running._answer(tmp_path / "none.so", cases, lambda case: None, threading.Event())
    with pytest.raises(InternalError, match=r"^none: llaisys check rope: expected results, .* is missing"):
        running._check(tmp_path / "none.so", "rope", "f32")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler to build faults with")
def test_faults_are_found_and_right_libraries_are_not_blamed() -> None:
    """An operator's fault, one of the engine, one that only `llaisys check` can find; and sums in another order."""
    chosen = tuple(BY_NAME[name] for name in ("rope-sign", "layers-together", "argmax-last-of-ties"))
    plan = Plan(dtypes=("bf16",), places=("middle",), decode=2, mutants=chosen, controls=8)
    seen: list[int] = []
    cases = run(plan, ROOT, progress=lambda label, done, total: seen.append(done))
    assert sorted(seen) == list(range(1, len(cases) + 1))
    assert len(cases) == 6 + 8, [c.library for c in cases]
    assert misses(cases) == [], [c.answer for c in misses(cases)]
    assert all(c.certified_rightly for c in cases if c.mutant is not None)
