"""Faults, real and simulated, and the proof that runs end as if there had been none."""
