"""`python -m ffdist.cli` is `ffdist`."""

from ffdist.cli import main

main()
