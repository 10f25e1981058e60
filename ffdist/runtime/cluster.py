"""Connection to a Ray cluster, and the cluster's resources."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

from ffdist.errors import ClusterStopped, ConfigError
from ffdist.runtime.access import (
    CONNECT_FIX,
    CONNECT_TIMEOUT_S,
    LOCAL,
    cluster_token,
    find_cluster,
    job_options,
    local_ray,
)

PROBE_TIMEOUT_S = 60.0
PROBE_GPU_FRACTION = 0.01
"""Fraction of a GPU that a task reserves to check whether torch can use it."""
AUTOSCALER = "autoscaler"
"""Key in a cluster's resources that says that the cluster has an autoscaler."""
Resources = Callable[[str], dict[str, float]]
"""Function that returns the total resources for a device, as in `pipeline.device`."""


class _Connection:
    """The connection of this process to Ray, shared by its threads.

    It is opened in its own thread, which must outlive Ray's processes, because the kernel kills them when it ends.

    Args:
        address: Address of a cluster; `local` starts one.
    """

    def __init__(self, address: str) -> None:
        self.address, self.num_users = address, 0
        self._stack, self._thread = ExitStack(), ThreadPoolExecutor(1)
        self.start = self._thread.submit(self._join)

    def close(self) -> None:
        """Disconnects, and stops the cluster if this process started it."""
        wait([self.start])
        if isinstance(sys.exception(), ClusterStopped):
            self._stack.pop_all()  # ray.shutdown() would exit this process, or wait for the cluster
        self._stack.close()
        self._thread.shutdown()

    def _join(self) -> Resources:
        import ray

        try:
            if self.address == LOCAL:
                self._stack.enter_context(local_ray())
            else:
                self._stack.enter_context(cluster_token(self.address))
                ray.init(self.address, **job_options())
                self._stack.callback(ray.shutdown)
        except ConfigError:
            raise
        except Exception as error:  # Ray also raises plain Exception
            if self.address == LOCAL:
                raise ConfigError(
                    f"Ray cannot be started on this machine: {error}; remove the cause, or use --runner serial"
                ) from error
            raise ConfigError(f"the Ray cluster at {self.address} cannot be joined: {error}; {CONNECT_FIX}") from error
        return cluster_resources


_lock = threading.Lock()
_connection: _Connection | None = None


@contextmanager
def connect(address: str | None) -> Iterator[Callable[[], Resources]]:
    """Joins or starts a Ray cluster in the background, and disconnects at the end of the `with` block.

    Threads share a connection, which is closed by its last user. A connection that the process already had stays open.

    Args:
        address: Address of a cluster; `local` for a new Ray on this machine; `auto` for the cluster that `ray start`
            started on this machine; None for RAY_ADDRESS, else as `auto` if there is such a cluster, else as `local`.

    Yields:
        A function that waits until Ray has started, and returns a function for the cluster's resources. Both may raise.

    Raises:
        ConfigError: The cluster cannot be reached, or the platform has no Ray runner.
    """
    global _connection
    if sys.platform != "linux":
        raise ConfigError(f"the Ray runner needs Linux (platform: {sys.platform}); use --runner serial")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences a warning
    with _lock:
        if not _connection and is_connected():
            connection = None
        else:
            address = find_cluster(address)
            connection = _connection = _connection or _Connection(address)
            if connection.address != address:
                raise ConfigError(
                    f"a process can use one Ray cluster at a time (in use: {connection.address}, wanted: {address}); "
                    f"start this run in another process"
                )
            connection.num_users += 1
    if not connection:
        yield lambda: cluster_resources
        return

    try:
        yield connection.start.result
    finally:
        with _lock:
            connection.num_users -= 1
            if not connection.num_users:
                _connection = None
                connection.close()


def cluster_probe() -> Callable[[], bool]:
    """Returns a function that checks whether the cluster and the driver's node still accept connections."""
    import ray

    context = ray.get_runtime_context()
    driver_nodes = [node for node in alive_nodes() if node["NodeID"] == context.get_node_id()]
    raylets = [f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in driver_nodes]
    addresses = [context.gcs_address, *raylets]

    def is_alive() -> bool:
        try:
            for host, _, port in (address.rpartition(":") for address in addresses):
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    return is_alive


def is_connected() -> bool:
    """Returns whether this process is connected to a Ray cluster."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # missing while another thread imports Ray
    return bool(is_initialized and is_initialized())


def num_nodes(resources: dict[str, float]) -> int:
    """Returns the number of nodes of a cluster, given its resources."""
    return max(1, sum(name.startswith("node:") and not name.endswith("_head__") for name in resources))


def alive_nodes() -> list[dict[str, Any]]:
    """Returns Ray's descriptions of the nodes that are alive.

    Raises:
        ConfigError: No node is alive.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not nodes:
        raise ConfigError("the Ray cluster was stopped (nodes alive: 0); start it again")
    return nodes


def cluster_resources(device: str = "auto") -> dict[str, float]:
    """Returns the total resources of the cluster. `GPU` counts only GPUs that torch can use.

    Args:
        device: As in `pipeline.device`. With `cpu`, GPUs are not checked.
    """
    import ray

    resources: dict[str, float] = {"CPU": 0.0, "GPU": 0.0, **ray.cluster_resources()}  # a head node may have none
    if has_autoscaler():
        resources[AUTOSCALER] = 1.0
    if resources["GPU"] and device != "cpu":
        resources["GPU"] = _usable_gpus()
    return resources


def has_autoscaler() -> bool:
    """Returns whether the cluster has an autoscaler, which adds nodes for pending placement groups.

    Its report has the node types of its configuration. Without an autoscaler, Ray reports one type for each node.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    return any(not name.startswith("node_") for name in report.get("active_nodes", {}))


_torch_has_cuda: dict[str, bool] = {}
"""Cache: whether torch can use the GPUs of a node, by node id. Ids are unique, and installed packages do not change."""


def _usable_gpus() -> float:
    """Returns the number of GPUs that torch can use.

    Ray counts the GPUs that their driver reports, so a task on each node checks with torch. It reserves a small
    fraction of a GPU, because other jobs may hold the rest.

    Raises:
        ConfigError: Nodes differ, or no task could start.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def probe() -> bool:
        import torch

        return torch.cuda.is_available()

    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in alive_nodes()}
    tasks = {
        ray.remote(num_gpus=PROBE_GPU_FRACTION, num_cpus=0, max_retries=0)(probe)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(): node
        for node, num_gpus in gpus.items()
        if num_gpus and node not in _torch_has_cuda
    }
    if tasks:
        done, pending = ray.wait(list(tasks), num_returns=len(tasks), timeout=PROBE_TIMEOUT_S)
        for task in pending:
            ray.cancel(task, force=True)
        for task in done:
            try:
                _torch_has_cuda[tasks[task]] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise ConfigError(
                    f"a node with GPUs cannot use torch ({error.cause!r}); install the same torch on all nodes, or set "
                    f"pipeline.device to cpu"
                ) from error
            except ray.exceptions.RayError:  # the node was lost
                continue
    probed = [node for node, num_gpus in gpus.items() if num_gpus and node in _torch_has_cuda]
    usable = [node for node in probed if _torch_has_cuda[node]]
    if not probed or (usable and usable != probed):
        reason = (
            f"torch can use the GPUs of {len(usable)} of {len(probed)} nodes; install the same torch on all nodes"
            if probed
            else f"{PROBE_GPU_FRACTION} of a GPU was not free within {PROBE_TIMEOUT_S:g} s; wait for other jobs"
        )
        raise ConfigError(f"{reason}, or set pipeline.device to cpu")
    return float(sum(gpus[node] for node in usable))


def machine_resources(device: str = "auto") -> dict[str, float]:
    """Returns the total resources of this machine, as `cluster_resources` does for a cluster."""
    import torch

    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def check_object_store(*, sample_bytes: int, in_flight_bytes: int) -> None:
    """Checks that a run fills at most half of the smallest object store of the cluster's nodes.

    Args:
        sample_bytes: Size of the samples of all splits.
        in_flight_bytes: Size of the messages and states in flight.

    Raises:
        ConfigError: The run would fill more.
    """
    store_bytes = int(min(node["Resources"].get("object_store_memory", 0) for node in alive_nodes()))
    if sample_bytes + in_flight_bytes > store_bytes / 2:
        raise ConfigError(
            f"a run may fill at most half of Ray's object store (samples: {sample_bytes:,} bytes, chunks in flight: "
            f"{in_flight_bytes:,}, half of the store: {store_bytes // 2:,}); set pipeline.chunk_size, "
            f"pipeline.max_in_flight or negatives.prefetch_chunks lower, or start Ray with a larger "
            f"--object-store-memory"
        )
