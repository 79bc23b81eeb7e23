"""`python -m llaisys` is the command `llaisys`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="llaisys")
