"""Runs `ffdist` as `python -m ffdist.cli`."""

from ffdist.cli import main

main()
