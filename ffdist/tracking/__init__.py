"""Where a run can be watched: MLflow, the terminal, pictures."""
