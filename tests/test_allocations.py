"""A decode step allocates nothing: its buffers are those of the step before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Stands before the C library's functions, and counts the calls that come from within [low, high). The library carries
# its own operator new, so that its allocations are calls of its own.
SHIM = r"""
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static uintptr_t low, high;
static atomic_long count;
void watch(uintptr_t begin, uintptr_t end) { low = begin, high = end; }
long calls(void) { return count; }

static void note(void *caller) {
    const uintptr_t address = (uintptr_t)caller;
    if (address >= low && address < high) ++count;
}

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void *malloc(size_t size) { return note(__builtin_return_address(0)), __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return note(__builtin_return_address(0)), __libc_calloc(n, size); }
void *realloc(void *p, size_t size) { return note(__builtin_return_address(0)), __libc_realloc(p, size); }
void *aligned_alloc(size_t align, size_t size) {
    return note(__builtin_return_address(0)), __libc_memalign(align, size);
}
void *mmap(void *p, size_t size, int access, int flags, int file, off_t offset) {
    note(__builtin_return_address(0));
    return (void *)syscall(SYS_mmap, p, size, access, flags, file, offset);
}
"""

CHILD = """
import ctypes, sys
import llaisys
from llaisys import Qwen2

shim = ctypes.CDLL(sys.argv[1])
shim.calls.restype = ctypes.c_long
llaisys.set_num_threads(int(sys.argv[2]))
model = Qwen2("tiny")
path = str(llaisys._lib.library_info().path.resolve())
mapped = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(path)]
shim.watch(ctypes.c_size_t(int(mapped[0][0], 16)), ctypes.c_size_t(int(mapped[-1][1], 16)))
session = model.session()
session.forward(list(range(100)), last=1)
counts = []
for _ in range(2):
    session.truncate(100)
    before = shim.calls()
    for token in range(150):
        session.forward([token], last=1)
    counts.append(shim.calls() - before)
print(before, *counts)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_decode_step_allocates_nothing(tmp_path: Path, threads: int) -> None:
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
    command = ["env", f"LD_PRELOAD={shim}", sys.executable, "-c", CHILD, str(shim), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, first, second = map(int, done.stdout.split())
    assert before > 10, "the shim counts nothing"
    assert first <= 3, "buffers of attention may grow with the sequence, by half at least"
    # A thread that slept through the first time makes its buffers in the second.
    assert second == 0 if threads == 1 else second <= 4
