"""The Forward-Forward algorithm, with torch alone."""

MOST_CLASSES = 256
