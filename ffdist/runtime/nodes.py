"""System metrics of the nodes of a cluster other than that of the driver."""

import time
from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ffdist.runtime.cluster import alive_nodes

INTERVAL_S = 10.0


class NodeMonitor:
    """Measures every other node by an actor on it, which takes no resources. Its methods never wait for a node.

    A lost node has no metrics until `refresh` is called.

    Args:
        monitor: Class of the actor. Its method `metrics` returns metrics by name, `system/...`.
        *args: Its arguments.
    """

    def __init__(self, monitor: type[Any], *args: Any) -> None:
        self._monitor, self._args = ray.remote(num_cpus=0)(monitor), args
        self._actors: dict[str, Any] = {}
        self._results: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._next_at = 0.0

    def refresh(self) -> None:
        """Starts an actor on each node that has none."""
        own, hosts = ray.get_runtime_context().get_node_id(), {}
        for each in alive_nodes():
            hosts[each["NodeID"]] = each["NodeManagerHostname"]
        counts = Counter(hosts.values())  # several nodes may be on one host
        names = {node: host if counts[host] == 1 else f"{host}-{node[:6]}" for node, host in hosts.items()}
        self._names = {node: self._names.get(node, name) for node, name in names.items() if node != own}
        self._actors = {node: actor for node, actor in self._actors.items() if node in self._names}
        for node in self._names.keys() - self._actors:
            affinity = NodeAffinitySchedulingStrategy(node, soft=False)
            self._actors[node] = self._monitor.options(scheduling_strategy=affinity).remote(*self._args)
            self._results[node] = self._actors[node].metrics.remote()

    def metrics(self) -> dict[str, float]:
        """Returns the metrics that have arrived, as MLflow names those of several nodes: `system/NODE/...`."""
        if time.monotonic() < self._next_at:
            return {}
        self._next_at, arrived = time.monotonic() + INTERVAL_S, dict[str, float]()
        for node, actor in list(self._actors.items()):
            if not ray.wait([self._results[node]], timeout=0)[0]:
                continue
            try:
                values = ray.get(self._results[node])
                self._results[node] = actor.metrics.remote()
            except Exception:  # the node or the actor is lost, or the monitor fails there
                del self._actors[node]
                continue
            prefix = f"system/{self._names[node]}/"
            arrived |= {prefix + name.removeprefix("system/"): value for name, value in values.items()}
        return arrived
