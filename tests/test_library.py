"""The shared library as a C program sees it: header, exported symbols, tiers that share no code, process-wide state."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from kernel_harness import cases, run, same_bits, using
from llaisys import _lib
from llaisys.reference import SPECS

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "kernels" / "llaisys.h"
TIER_NAMESPACES = ("4avx2", "6avx512", "10avx512bf16", "3amx")  # as they appear in mangled names
X86 = platform.machine() == "x86_64"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


def library() -> Path:
    return _lib.library_info().path


# ----------------------------------------------------------------- header


def prototypes() -> dict[str, str]:
    """Every function that the header declares, by name, without comments and line breaks."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    text = re.sub(r"\s+", " ", re.sub(r"^\s*#.*$", "", text, flags=re.M))
    found = (match.strip() + ";" for match in re.findall(r"LLAISYS_API ([^;{}]+);", text))
    return {re.findall(r"(\w+)\(", line)[0]: line for line in found}


def test_the_header_declares_every_operator_as_its_spec_does() -> None:
    declared = prototypes()
    for spec in SPECS.values():
        assert declared.get(spec.c_name) == spec.c_prototype


def test_the_header_declares_nothing_else_than_python_knows() -> None:
    operators = {spec.c_name for spec in SPECS.values()}
    assert set(prototypes()) - operators == set(_lib._PROTOTYPES)
    for name, line in prototypes().items():
        count = 0 if line.endswith("(void);") else line.count(",") + 1
        function = getattr(_lib.library(), name)
        assert len(function.argtypes) == count, line
        kind = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "const char *": ctypes.c_char_p}
        result = line[: line.index("llaisys")].strip() if line[0] != "L" else "handle"
        assert function.restype is kind.get(result, ctypes.c_void_p), line


@pytest.mark.parametrize("flags", [("gcc", "-std=c11"), ("g++", "-xc++", "-std=c++11"), ("g++", "-xc++", "-std=c++20")])
def test_the_header_compiles(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Alone, twice in a row, and without a warning."""
    source = tmp_path / "user.c"
    source.write_text('#include "llaisys.h"\n#include "llaisys.h"\nint main(void) { return LLAISYS_OK; }\n')
    strict = ("-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", f"-I{HEADER.parent}")
    output(tool(flags[0]), *flags[1:], *strict, source)


PROGRAM = r"""
#include "llaisys.h"
#include <stdio.h>
#include <string.h>
int main(void) {
    float a[6] = {1, 2, 3, 4, 5, 6}, b[3] = {10, 20, 30}, out[6];
    LlaisysTensor ta = {a, LLAISYS_DTYPE_F32, 2, {2, 3}, {3, 1}}, tb = {b, LLAISYS_DTYPE_F32, 2, {2, 3}, {0, 1}};
    LlaisysTensor to = {out, LLAISYS_DTYPE_F32, 2, {2, 3}, {3, 1}};
    if (llaisysAbiVersion() != LLAISYS_ABI_VERSION) return 1;
    if (llaisysAdd(&to, &ta, &tb) != LLAISYS_OK) return 2;
    for (int i = 0; i < 6; ++i) if (out[i] != a[i] + b[i % 3]) return 3;
    if (llaisysAdd(NULL, &ta, &tb) != LLAISYS_ERROR_INVALID_ARGUMENT || !strstr(llaisysLastError(), "out")) return 4;
    puts(llaisysVersion());
    return 0;
}
"""


def test_a_c_program_can_use_it(tmp_path: Path) -> None:
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    linked = (library(), f"-Wl,-rpath,{library().parent}")
    output(tool("gcc"), "-std=c11", f"-I{HEADER.parent}", source, *linked, "-o", program)
    assert output(program).strip() == llaisys.__version__


# ---------------------------------------------------------------- symbols


def test_it_exports_the_functions_of_the_header_and_no_more() -> None:
    names = [line.split()[-1] for line in output(tool("nm"), "-D", "--defined-only", library()).splitlines()]
    assert sorted(names) == sorted(prototypes())


def test_it_needs_nothing_but_the_c_library() -> None:
    """No OpenMP runtime, and no libstdc++ of a certain version on the machine of the user."""
    needed = re.findall(r"NEEDED.*\[(.*?)\]", output(tool("readelf"), "-d", library()))
    assert needed and all(re.match(r"lib(c|m|pthread|dl|rt)\.so|ld-linux", name) for name in needed), needed


def test_one_library_carries_all_tiers() -> None:
    if not X86:
        pytest.skip("tiers other than scalar exist on x86_64 only")
    symbols = output(tool("nm"), library())
    if "llaisys" not in symbols:
        pytest.skip("the library is stripped")
    for spec in SPECS.values():
        if spec.name == "rope_self_attention":  # the kernel of self_attention
            continue
        for tier in ("6scalar", "4avx2", "6avx512"):
            assert re.search(rf"N7llaisys{tier}\d+[a-z_]*{spec.name.split('_')[-1]}", symbols), f"{spec.name} in {tier}"


def test_code_outside_the_tiers_runs_on_any_processor() -> None:
    """An inline function of two tiers is one symbol, and the linker may keep the copy with AVX-512 in it. So, in what
    was linked: no function whose name is not in a tier's namespace has an instruction that x86-64's base lacks.

    This sees all ways in which such code gets in: shared templates, the standard library, and wrong compiler flags.
    """
    if not X86:
        pytest.skip("tiers other than scalar exist on x86_64 only")
    listing = output(tool("objdump"), "-d", "--no-show-raw-insn", library())
    functions = re.split(r"^[0-9a-f]+ <(.+)>:$", listing, flags=re.M)[1:]
    named = dict(zip(functions[::2], functions[1::2], strict=True))
    if not any("7llaisys" in name for name in named):
        pytest.skip("the library is stripped")
    wide = re.compile(r"^\s*[0-9a-f]+:\s+(v[a-z0-9]+\s.*%[xyz]mm.*|[a-z]+\s.*%[yz]mm.*|[a-z]*tile.*)$", re.M)
    tiers = {name for name in named if any(tier in name for tier in TIER_NAMESPACES)}
    assert any(wide.search(named[name]) for name in tiers), "the pattern finds nothing at all"
    for name in set(named) - tiers:
        found = wide.search(named[name])
        assert found is None, f"{name}: {found.group(1) if found else ''}"


def test_objects_of_a_tier_define_nothing_outside_of_it() -> None:
    """The same question asked of the objects, where a build folder is at hand: whatever another object could be given
    in place of its own (weak, or global) lies in the tier's namespace."""
    folders = [
        p for tier in ("avx2", "avx512", "avx512bf16", "amx") for p in library().parent.glob(f"libllaisys_{tier}.a.p")
    ]
    if not folders:
        pytest.skip("no build folder beside the library (it is installed, not editable)")
    for folder in folders:
        if not (objects := sorted(folder.glob("*.o"))):
            continue
        tier = folder.name.removeprefix("libllaisys_").removesuffix(".a.p")
        for line in output(tool("nm"), "--defined-only", *objects).splitlines():
            if (fields := line.split()) and len(fields) == 3 and fields[1] in "TWVRDBuvw":
                assert f"7llaisys{len(tier)}{tier}" in fields[2], f"{folder.name}: {line}"


# ---------------------------------------------------- state of the process


def test_subnormals_and_rounding_are_left_alone() -> None:
    """No flush-to-zero and no other rounding stays behind (MXCSR): numpy still computes as before."""
    tiny = np.full(8, 1e-40, np.float32)
    ulp = np.float32(2.0**-24)

    def arithmetic() -> tuple[bytes, ...]:
        one = np.ones(8, np.float32)
        return (tiny / 3).tobytes(), (tiny * 0.5 + tiny).tobytes(), (one + ulp).tobytes(), (one / 3).tobytes()

    before = arithmetic()
    assert np.frombuffer(before[0], np.float32).all()
    for tier in llaisys.isas():
        with using(tier, 2):
            for name, spec in SPECS.items():
                for case in cases(name, "f32")[-12:]:
                    run(spec, case.values, name)
                assert arithmetic() == before, f"after {name} {tier}"


def results() -> list[bytes]:
    """All operators on one case each."""
    return [x.tobytes() for name, spec in SPECS.items() for x in run(spec, cases(name, "bf16")[-1].values, name)]


def test_python_threads_at_once() -> None:
    """Eight threads, each calling all operators, on sizes that the pool is used for and small ones."""
    big = {name: np.random.default_rng(0).standard_normal((70, 515), dtype=np.float32) for name in ("x", "w")}
    with using(threads=2):
        expected = [llaisys.ops.linear(big["x"], big["w"]).tobytes(), *results()]
        wrong: list[int] = []

        def work(n: int) -> None:
            try:
                for _ in range(4):
                    if [llaisys.ops.linear(big["x"], big["w"]).tobytes(), *results()] != expected:
                        wrong.append(n)
            except BaseException:
                wrong.append(n)
                raise

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


FORK = """
import os, numpy as np, llaisys
x, w = np.linspace(-1, 1, 70 * 515, dtype=np.float32).reshape(70, 515), np.linspace(0, 1, 99 * 515, dtype=np.float32)
w = w.reshape(99, 515)
def digest(): return llaisys.ops.linear(x, w).tobytes() + llaisys.ops.swiglu(x, x).tobytes()
llaisys.set_num_threads(3)
expected = digest()
pids = []
for n in range(3):
    if not (pid := os.fork()):
        ok = digest() == expected
        if not os.fork():  # and a child of the child
            os._exit(0 if digest() == expected else 1)
        os._exit(0 if ok and os.wait()[1] == 0 else 1)
    pids.append(pid)
assert digest() == expected
print([os.waitpid(pid, 0)[1] for pid in pids])
"""


def script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLAISYS_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def test_fork_while_the_pool_is_up() -> None:
    done = script(FORK)
    assert done.stdout.strip() == "[0, 0, 0]", done


ENVIRONMENT = """
import os, sys, numpy as np, llaisys
from llaisys import _lib
one = np.ones(3, np.float32)
library = _lib.library()  # reads neither variable
for text in sys.argv[2:]:
    if not os.fork():
        os.environ[sys.argv[1]] = text
        for call in (llaisys.num_threads, llaisys.isa, lambda: llaisys.ops.add(one, one).tolist()):
            try: print(repr(text), call(), sep="|")
            except llaisys.LlaisysError as error: print(repr(text), type(error).__name__, error, sep="|")
        llaisys.set_num_threads(2); llaisys.set_isa("scalar")
        print(repr(text), llaisys.ops.add(one, one).tolist(), sep="|", flush=True)
        os._exit(0)
    os.wait()
"""


def environment(name: str, *texts: str) -> dict[str, list[list[str]]]:
    """For each text: what num_threads, isa, add, and add after set_num_threads and set_isa, say."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLAISYS_")}
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT, name, *texts], env=inherited, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {text: [line[1:] for line in lines if line[0] == repr(text)] for text in texts}


def check_environment(name: str, good: dict[str, Callable[[list[Any]], bool]], bad: list[str]) -> None:
    found = environment(name, *good, *bad)
    for text, lines in found.items():
        assert len(lines) == 4 and lines[3] == ["[2.0, 2.0, 2.0]"], f"{name}={text!r}: {lines}"
        if text in good:
            assert lines[2] == ["[2.0, 2.0, 2.0]"] and good[text](lines), f"{name}={text!r}: {lines}"
        else:
            failed = [line for line in lines[:3] if len(line) == 2]
            assert failed and all(name in line[1] and text[:40] in line[1] for line in failed), f"{text!r}: {lines}"


def test_nonsense_in_the_number_of_threads() -> None:
    """Refused with the variable's name by whoever needs the number; an empty text is none."""
    good: dict[str, Callable[[list[Any]], bool]] = {
        "1": lambda lines: lines[0] == ["1"],
        "7": lambda lines: lines[0] == ["7"],
        "1024": lambda lines: lines[0] == ["1024"],
        "": lambda lines: 1 <= int(lines[0][0]) <= (os.cpu_count() or 1),
    }
    bad = ["0", "-1", "1025", "two", "2x", "1.5", "1e3", "9" * 30, "0x4", "2 3", "-9223372036854775808"]
    check_environment("LLAISYS_NUM_THREADS", good, bad)


def test_nonsense_in_the_tier() -> None:
    good: dict[str, Callable[[list[Any]], bool]] = {
        "scalar": lambda lines: lines[1] == ["scalar"],
        llaisys.isas()[-1]: lambda lines: lines[1] == [llaisys.isas()[-1]],
        "": lambda lines: lines[1] == [llaisys.isas()[-1]],
    }
    lacking = [tier for tier in _lib.TIERS if not llaisys.has_isa(tier)]
    check_environment("LLAISYS_ISA", good, ["AVX2", "avx", "scalar ", "sse9", "avx512,avx2", "0", "x" * 39, *lacking])


def test_threads_beyond_reason_still_compute() -> None:
    """1024 threads on any machine: the result is that of one."""
    x = np.random.default_rng(0).standard_normal((300, 300), dtype=np.float32)
    with using(threads=1):
        expected = llaisys.ops.linear(x, x)
    done = script(
        "import numpy as np, llaisys, sys\n"
        "x = np.random.default_rng(0).standard_normal((300, 300), dtype=np.float32)\n"
        "llaisys.set_num_threads(1024)\n"
        "sys.stdout.write(llaisys.ops.linear(x, x).tobytes().hex())"
    )
    assert done.stdout == expected.tobytes().hex(), done.stderr[-500:]
    assert same_bits(llaisys.ops.linear(x, x), expected)
