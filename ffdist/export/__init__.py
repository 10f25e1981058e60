"""Saves networks as files and serves them through MLflow.

This package is stored with each model together with `ff` and `storage`, so it must import only these two.
"""
