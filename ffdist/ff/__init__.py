"""The Forward-Forward algorithm, with torch alone."""

MAX_CLASSES = 256
