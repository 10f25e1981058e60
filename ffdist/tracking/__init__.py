"""MLflow tracking: the tracking store and the uploads to it. Only this package and a served model import mlflow."""
