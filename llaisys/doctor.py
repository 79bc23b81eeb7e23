"""What `llaisys doctor` tells: the library, the machine, the versions, and what is wrong.

It must work where the rest does not, so everything that can fail is tried on its own, and nothing of the package that
needs the library or another package is imported at the top.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Report", "examine", "render"]

#: Looked up through their metadata, never imported.
PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "typer", "rich", "torch", "transformers")
_RUNTIMES = {
    "libgomp": "GNU OpenMP",
    "libomp": "LLVM OpenMP",
    "libiomp5": "Intel OpenMP",
    "openblas": "OpenBLAS",
    "libmkl": "MKL",
    "libtbb": "TBB",
    "libblis": "BLIS",
}


@dataclass
class Report:
    """Facts by section, and what is wrong. `notes` are worth knowing but nothing is broken."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": not self.problems, "problems": self.problems, "notes": self.notes, **self.sections}

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """The result of `function`; None, and a problem, if it raises."""
        try:
            return function()
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if not any(text in known for known in self.problems):
                self.problems.append(f"{what}: {text}")
            return None


def examine() -> Report:
    """Look at everything."""
    report = Report()
    report.sections["library"] = _library(report)
    report.sections["machine"] = _machine(report)
    report.sections["threads"] = _threads(report)
    report.sections["versions"] = _versions(report)
    report.sections["model"] = _model(report)
    library = report.sections["library"]
    if library["loaded"] and not report.problems:  # else it would say the same again
        library["works"] = report.attempt("self-test", _self_test) is not None
    return report


def _library(report: Report) -> dict[str, Any]:
    from . import _lib

    facts: dict[str, Any] = dict.fromkeys(
        ("path", "override", "loaded", "version", "build", "expected_build", "abi", "expected_abi", "works")
    )
    try:
        from . import _build

        facts |= {"expected_build": _build.BUILD_HASH, "expected_abi": _build.ABI_VERSION}
    except ImportError:
        pass  # loading the library says so
    facts["override"] = os.environ.get(_lib.OVERRIDE) or None
    path = report.attempt("library", _lib.library_path)
    if path is not None:
        facts["path"] = str(path[0])
    info = report.attempt("library", _lib.library_info)
    facts["loaded"] = info is not None
    if info is None:
        facts |= _look_inside(facts["path"])
        return facts
    facts |= {"version": info.version, "build": info.build_hash, "abi": info.abi}
    if info.stale:
        report.notes.append(
            f"the library that {_lib.OVERRIDE} names is of other sources than this package: "
            f"expected build {info.package_hash}, found {info.build_hash}"
        )
    return facts


def _look_inside(path: str | None) -> dict[str, Any]:
    """Version, hash and ABI of a library that is refused, as far as they can be had from it."""
    import ctypes

    found: dict[str, Any] = {}
    if path is None or not Path(path).is_file():
        return found
    try:
        library = ctypes.CDLL(path)
        for key, name, kind in (
            ("version", "llaisysVersion", ctypes.c_char_p),
            ("build", "llaisysBuildHash", ctypes.c_char_p),
            ("abi", "llaisysAbiVersion", ctypes.c_int32),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = kind, ()
            value = function()
            found[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    except (OSError, AttributeError):
        pass
    return found


def _self_test() -> bool:
    """One product of matrices, against its oracle."""
    import numpy as np

    from . import ops
    from .reference import SPECS, check

    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 257), (5, 257)))
    (oracle,) = SPECS["linear"].oracle(x, weight, None)
    verdict = check(ops.linear(x, weight), oracle, np.dtype(np.float32))
    if not verdict:
        raise ValueError(f"linear gives wrong results: {verdict}")
    return True


def _machine(report: Report) -> dict[str, Any]:
    from . import _lib

    memory = _memory()
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "isas": None,
        "isa": None,
        "LLAISYS_ISA": os.environ.get("LLAISYS_ISA") or None,
        "memory_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "memory_limit_bytes": _cgroup_memory(),
        "huge_pages": _bracketed(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "system": f"{platform.system()} {platform.release()}",
    }
    if report.sections["library"]["loaded"]:
        facts["isas"] = report.attempt("instruction sets", lambda: list(_lib.isas()))
        facts["isa"] = report.attempt("instruction set", _lib.isa)
    return facts


def _threads(report: Report) -> dict[str, Any]:
    from . import _lib

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    facts: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "cpus_allowed": allowed,
        "cpu_quota": _cgroup_cpus(),
        "LLAISYS_NUM_THREADS": os.environ.get("LLAISYS_NUM_THREADS") or None,
        "in_use": None,
        "other_runtimes": _runtimes(),
    }
    if report.sections["library"]["loaded"]:
        facts["in_use"] = report.attempt("threads", _lib.num_threads)
    count = facts["in_use"]
    for limit, name in (
        (allowed, "CPUs that the process may use"),
        (facts["cpu_quota"], "CPUs that its cgroup grants"),
    ):
        if count and limit and count > limit:
            report.notes.append(f"there are more threads ({count}) than {name} ({limit:g}), which makes them wait")
    if len([name for name in facts["other_runtimes"] if "OpenMP" in name]) > 1:
        report.notes.append("several OpenMP runtimes are loaded; llaisys uses none of them")
    return facts


def _versions(report: Report) -> dict[str, Any]:
    needed = report.attempt("package metadata", _requirements) or {}
    facts: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
            if name in needed:
                report.problems.append(f"{name}: expected {name}{needed[name]}, found none; run pip install {name}")
            continue
        least = re.search(r">=\s*([\d.]+)", needed.get(name, ""))
        if least and _numbers(facts[name]) < _numbers(least[1]):
            report.problems.append(f"{name}: expected {needed[name]}, found {facts[name]}")
    return facts


def _requirements() -> dict[str, str]:
    """What the package needs, from its own metadata: name -> ">=1.26"; without the extras."""
    result = {}
    for text in importlib.metadata.requires("llaisys") or []:
        match = re.match(r"([\w.-]+)\s*([^;]*)", text)
        if match and "extra ==" not in text:
            result[match[1].replace("-", "_").lower()] = match[2].strip()
    return result


def _model(report: Report) -> dict[str, Any]:
    """The embedded model: whether it is there and sound."""

    def open_model() -> dict[str, Any]:
        from .checkpoint import Checkpoint

        checkpoint = Checkpoint.open("tiny")
        return {"path": str(checkpoint.path), "bytes": checkpoint.nbytes, "dtype": checkpoint.config.dtype}

    return report.attempt("embedded model", open_model) or {"path": None, "bytes": None, "dtype": None}


# --------------------------------------------------- what the system says


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_model() -> str:
    """The name of the processor."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def _memory() -> dict[str, int]:
    return {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    }


def _cgroup(file: str) -> str:
    """A file of the cgroup (version 2) of this process."""
    found = re.search(r"^0::(/.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    return (found and _read(f"/sys/fs/cgroup{found[1]}/{file}")) or _read(f"/sys/fs/cgroup/{file}")


def _cgroup_memory() -> int | None:
    text = _cgroup("memory.max").strip()
    return int(text) if text.isdigit() else None


def _cgroup_cpus() -> float | None:
    found = re.match(r"(\d+) (\d+)", _cgroup("cpu.max"))
    return int(found[1]) / int(found[2]) if found else None


def _bracketed(text: str) -> str | None:
    """The chosen one of "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None


def _runtimes() -> dict[str, str]:
    """Libraries with threads of their own in this process: what they are -> path."""
    found: dict[str, str] = {}
    for path in re.findall(r"\s(/\S.*)$", _read("/proc/self/maps"), re.MULTILINE):
        for mark, name in _RUNTIMES.items():
            if mark in Path(path).name:
                found.setdefault(name, path)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


# ------------------------------------------------------------------ output


def render(report: Report) -> None:
    """Print the report for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False, highlight=False)
    for title, rows in _rows(report).items():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(style="dim", no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        console.print(Text(title, style="bold"))
        console.print(table)
        console.print()
    if "roofs" in report.sections:
        from .bench.report import roof_figures

        console.print(roof_figures(report.sections["roofs"], report.sections["threads"]["in_use"]).rich())
        console.print()
    findings = Table.grid(padding=(0, 2, 0, 0))
    findings.add_column(no_wrap=True)
    findings.add_column(overflow="fold")
    for text in report.notes:
        findings.add_row(Text("note", style="yellow"), Text(text))
    for text in report.problems:
        findings.add_row(Text("problem", style="bold red"), Text(text))
    console.print(findings)
    if not report.problems:
        console.print(Text("nothing is wrong", style="green"))


def _rows(report: Report) -> dict[str, list[tuple[str, str]]]:
    library, machine, threads = (report.sections[name] for name in ("library", "machine", "threads"))
    versions, model = report.sections["versions"], report.sections["model"]
    build = _known(library["build"])
    if library["build"] != library["expected_build"]:
        build += f", expected {_known(library['expected_build'])}"
    abi = _known(library["abi"])
    if library["abi"] != library["expected_abi"]:
        abi += f", expected {_known(library['expected_abi'])}"
    memory = f"{_gib(machine['memory_bytes'])}, {_gib(machine['memory_available_bytes'])} available"
    if machine["memory_limit_bytes"]:
        memory += f", limit {_gib(machine['memory_limit_bytes'])}"
    cpus = f"{_known(threads['cpus'])}, {_known(threads['cpus_allowed'])} allowed"
    if threads["cpu_quota"]:
        cpus += f", quota {threads['cpu_quota']:g}"
    installed = {name: version for name, version in versions.items() if version is not None}
    return {
        "library": [
            ("path", _known(library["path"]) + (" (LLAISYS_LIBRARY)" if library["override"] else "")),
            ("version", _known(library["version"])),
            ("build", build),
            ("ABI", abi),
            ("self-test", {True: "passed", False: "failed", None: "not run"}[library["works"]]),
        ],
        "machine": [
            ("CPU", f"{machine['cpu']} ({machine['architecture']})"),
            ("tiers", " ".join(machine["isas"] or ["unknown"])),
            ("tier in use", _known(machine["isa"]) + _from("LLAISYS_ISA", machine)),
            ("memory", memory),
            ("huge pages", _known(machine["huge_pages"])),
            ("system", machine["system"]),
        ],
        "threads": [
            ("CPUs", cpus),
            ("in use", _known(threads["in_use"]) + _from("LLAISYS_NUM_THREADS", threads)),
            ("other runtimes", "\n".join(f"{k}  {v}" for k, v in threads["other_runtimes"].items()) or "none loaded"),
        ],
        "versions": list(installed.items()),
        "embedded model": [
            ("path", _known(model["path"])),
            ("weights", f"{model['bytes'] / 2**20:.1f} MiB, {model['dtype']}" if model["bytes"] else "unknown"),
        ],
    }


def _from(name: str, facts: dict[str, Any]) -> str:
    return f" ({name}={facts[name]})" if facts[name] else ""


def _known(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB"
