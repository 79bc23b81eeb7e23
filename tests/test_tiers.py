"""Instruction set tiers: which there are, that each is asked for by name, and what all have in common."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import llaisys
from kernel_harness import TIERS, cases, run, same_bits, using
from llaisys import ops
from llaisys.errors import UnsupportedError
from llaisys.reference import FLOATS, SPECS
from operator_tests import need

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {
    "avx2": {"avx", "avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16"},
}
EXACT = ("add", "argmax", "embedding", "rearrange")


def test_tiers_are_those_of_the_processor() -> None:
    """As the operating system describes it; each tier needs those below it."""
    if not CPUINFO.is_file() or platform.machine() != "x86_64":
        pytest.skip("no /proc/cpuinfo of an x86_64 machine")
    line = next(x for x in CPUINFO.read_text().splitlines() if x.startswith("flags"))
    flags, has = set(line.split(":")[1].split()), True
    for tier, needed in FLAGS.items():
        has = has and needed <= flags
        # Tiles also need a permission, which a container may refuse.
        assert llaisys.has_isa(tier) == has or (tier == "amx" and has)
    assert llaisys.has_isa("scalar") and llaisys.isas()[0] == "scalar"


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_is_had_or_refused_by_name(tier: str) -> None:
    before = llaisys.isa()
    if llaisys.has_isa(tier):
        with using(tier):
            assert llaisys.isa() == tier
    else:
        with pytest.raises(UnsupportedError, match=f"no {tier}.*best tier is {llaisys.isas()[-1]}"):
            llaisys.set_isa(tier)
    assert llaisys.isa() == before


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_operators_have_the_same_bits_in_all_tiers(name: str, tier: str) -> None:
    need(tier)
    for dtype in FLOATS:
        for case in cases(name, dtype):
            where = f"{name} {dtype} {tier} {case.label}"
            with using("scalar"):
                expected = run(SPECS[name], case.values, where)
            with using(tier):
                found = run(SPECS[name], case.values, where)
            for a, b in zip(found, expected, strict=True):
                if name == "add":  # which NaN a sum of two is, is the processor's choice
                    a, b = (np.where(np.isnan(x), np.asarray(1, x.dtype), x) for x in (a, b))
                assert same_bits(a, b), where


CODE = """
import sys, numpy as np, llaisys
x = np.linspace(-3, 3, 7 * 333, dtype=np.float32).reshape(7, 333)
sys.stdout.write(llaisys.isa() + " " + llaisys.ops.linear(x, x).tobytes().hex())
"""


@pytest.mark.parametrize("tier", TIERS)
def test_the_environment_chooses_the_same_kernels(tier: str) -> None:
    """LLAISYS_ISA gives the bits of set_isa; what the machine lacks is refused by the first operator, by name."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "LLAISYS_ISA": tier}, capture_output=True, text=True
    )
    if not llaisys.has_isa(tier):
        assert done.returncode == 1 and "UnsupportedError" in done.stderr and tier in done.stderr
        return
    x = np.linspace(-3, 3, 7 * 333, dtype=np.float32).reshape(7, 333)
    with using(tier):
        assert done.stdout == f"{tier} {ops.linear(x, x).tobytes().hex()}", done.stderr[-500:]


def test_tiers_really_differ() -> None:
    """The sum of one row runs in another order in each tier (amx shares f32 with avx512), so the tests above saw
    different kernels and not one kernel twice."""
    x = np.random.default_rng(0).standard_normal((1, 1000), dtype=np.float32)
    weight = np.random.default_rng(1).standard_normal((200, 1000), dtype=np.float32)
    results = {}
    for tier in llaisys.isas():
        with using(tier):
            results[tier] = ops.linear(x, weight).tobytes()
    if len(llaisys.isas()) == 1:
        pytest.skip("this machine has the scalar tier only")
    assert len({results[tier] for tier in llaisys.isas() if tier != "amx"}) == len(set(llaisys.isas()) - {"amx"})


def test_switching_while_others_compute() -> None:
    """A call keeps to the tier that it started in: every result is that of some tier, never a mixture."""
    x = np.random.default_rng(0).standard_normal((9, 500), dtype=np.float32)
    weight = np.random.default_rng(1).standard_normal((300, 500), dtype=np.float32)
    allowed, wrong, stop = set(), [], threading.Event()
    for tier in llaisys.isas():
        with using(tier):
            allowed.add(ops.linear(x, weight).tobytes())

    def compute() -> None:
        while not stop.is_set():
            if ops.linear(x, weight).tobytes() not in allowed:
                wrong.append("linear")

    before = llaisys.isa()
    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(300):
            llaisys.set_isa(llaisys.isas()[n % len(llaisys.isas())])
            ops.add(x, x)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        llaisys.set_isa(before)
    assert not wrong
