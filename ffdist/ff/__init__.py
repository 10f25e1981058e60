"""The Forward-Forward algorithm, with torch alone."""
