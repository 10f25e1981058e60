"""What the driver's machine does beside a run, as MLflow measures it."""

import time
from contextlib import suppress
from typing import Any

EVERY_S = 10.0


class System:
    """Processor, memory, disk, network and, where `nvidia-ml-py` is installed, GPUs, every so often."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # whatever keeps it from seeing one
            self._monitors.append(GPUMonitor())
        self._due = 0.0

    def metrics(self) -> dict[str, float]:
        """Returns what is measured by MLflow's names, `system/...`; nothing where it is not time yet."""
        if time.monotonic() < self._due:
            return {}
        self._due, found = time.monotonic() + EVERY_S, dict[str, float]()
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found
