"""Whole models built from the operators."""
