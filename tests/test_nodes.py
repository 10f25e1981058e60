"""System metrics of the nodes of a cluster."""

import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from ffdist.runtime import nodes as nodes_module
from ffdist.runtime.nodes import NodeMonitor


class Count:
    def __init__(self, start: float) -> None:
        self._count = start

    def metrics(self) -> dict[str, float]:
        self._count += 1
        return {"system/count": self._count}


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(nodes_module, "INTERVAL_S", 0.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(cluster.address)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this module
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wait_for_metrics(monitor: NodeMonitor, count: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    deadline = time.monotonic() + 100
    while len(metrics) < count:
        assert time.monotonic() < deadline
        metrics |= monitor.metrics()
        time.sleep(0.01)
    return metrics


def test_other_nodes_are_measured_without_their_resources_and_may_be_lost(cluster):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    monitor = NodeMonitor(Count, 0.0)
    monitor.refresh()
    names = wait_for_metrics(monitor, 2).keys()
    assert all(name.startswith("system/") and name.endswith("/count") for name in names)
    assert ray.available_resources()["CPU"] == 3
    cluster.remove_node(nodes[0])
    deadline = time.monotonic() + 100
    while len(monitor._actors) > 1:  # the lost node has no metrics any more, and nothing is raised
        assert time.monotonic() < deadline
        monitor.metrics()
        time.sleep(0.01)
    assert len(wait_for_metrics(monitor, 1)) == 1
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monitor.refresh()
    assert len(wait_for_metrics(monitor, 2)) == 2


def test_one_node_needs_no_actor(ray_start_4_cpus):
    monitor = NodeMonitor(Count, 0.0)
    monitor.refresh()
    assert monitor.metrics() == {}
    assert not monitor._actors
