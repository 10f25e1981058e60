"""Fault injection, real and simulated: checks that faults change no weights or metrics. Only `cli` imports it."""
