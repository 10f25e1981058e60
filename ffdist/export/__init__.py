"""Saves networks as files, exports them as programs, and serves them through MLflow."""
