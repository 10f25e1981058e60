"""Plots of runs. The only package that imports matplotlib."""
