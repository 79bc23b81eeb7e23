"""The test of the differ itself: kernels with known faults, and how many of them it names (`llaisys selftest`).

A fault is a small patch to a copy of `kernels/` (`mutants`), which is built as a library of its own (`build`) and given
to the differ by LLAISYS_LIBRARY alone, in a process of its own (`worker`). The shipped kernels contain no hooks for it.
Beside the differ the rules that others use judge the same runs (`rules`).
"""
