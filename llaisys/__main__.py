"""`python -m llaisys` is the command `llaisys`."""

from .cli import main

if __name__ == "__main__":
    main()
