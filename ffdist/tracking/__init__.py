"""MLflow tracking: the tracking store and the uploads to it. Only this package and `export.served` import mlflow."""
