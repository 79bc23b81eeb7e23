"""The commands of `llaisys`, one module each. `llaisys.cli` puts them together."""
