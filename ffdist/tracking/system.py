"""System metrics of a machine, measured by MLflow's monitors."""

import time
from contextlib import suppress
from typing import Any

INTERVAL_S = 10.0


class SystemMonitor:
    """Measures CPU, host memory, disk, network and, if `nvidia-ml-py` is installed, GPUs.

    Args:
        interval_s: Shortest time between two measurements.
    """

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no GPU, no driver or no nvidia-ml-py
            self._monitors.append(GPUMonitor())
        self._next_at, self._interval_s = 0.0, interval_s

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by MLflow's names, `system/...`; an empty dict before the next measurement is due."""
        if time.monotonic() < self._next_at:
            return {}
        self._next_at, values = time.monotonic() + self._interval_s, dict[str, float]()
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values
