"""Finished runs: evaluation, inference, export, plots and the results table. Does not import `ffdist.training`."""
