"""Training: the flow of a run, its loop, its start and recovery. Only `cli` and developer tools use it."""
