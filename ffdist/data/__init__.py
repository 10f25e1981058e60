"""Datasets: reading and validation, the order of samples, and the negatives store.

Imports neither ray nor mlflow, nor `pipeline` and the packages that use it.
"""
