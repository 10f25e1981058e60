"""Checkpoints: their files, manifests and retention. Imports neither ray nor mlflow, nor `ffdist.training`."""
