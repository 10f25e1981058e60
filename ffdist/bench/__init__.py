"""Benchmarks: the speed of a run relative to what the machine can do. A developer tool; only `cli` imports it."""
