"""The computation of a run: schedule, stages, what travels between them, and the serial runner.

Takes plain values, not configurations, and works where only torch is installed: no ray, no mlflow.
"""
