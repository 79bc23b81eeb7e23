"""Measuring: operators beside torch and their twins, whole models beside transformers, and the roofs of the machine.

`llaisys bench` and the benchmarks of the tree (`pytest --benchmark-only`) share what is here.
"""
