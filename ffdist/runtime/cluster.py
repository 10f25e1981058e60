"""Starting or joining a Ray cluster, and its resources."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

from ffdist.config import ConfigError
from ffdist.failures import ClusterStopped
from ffdist.runtime.access import (
    CONNECT_TIMEOUT_S,
    LOCAL,
    WAY_OUT,
    cluster_token,
    find_cluster,
    job_options,
    local_ray,
)
from ffdist.runtime.access import private_ray as private_ray

PROBE_TIMEOUT_S = 60.0
GPU_SHARE = 0.01
"""Share of a GPU that a task holds which asks torch whether it can use one."""
AUTOSCALER = "autoscaler"
"""Key in a cluster's resources, where it has an autoscaler."""
Resources = Callable[[str], dict[str, float]]
"""Returns the totals of what a run on a device, as in `pipeline.device`, can use."""


class _Connection:
    """A connection of this process to Ray, which its threads share.

    It is started in a thread of its own. That thread must outlive Ray's processes, or the kernel ends them with it.

    Args:
        address: Of a cluster; `local` starts one.
    """

    def __init__(self, address: str) -> None:
        self.address, self.users = address, 0
        self._stack, self._thread = ExitStack(), ThreadPoolExecutor(1)
        self._start = self._thread.submit(self._join)

    def wait(self) -> Resources:
        """Waits until Ray has started."""
        return self._start.result()

    def close(self) -> None:
        """Disconnects, and ends the cluster if this process started it."""
        wait([self._start])
        if isinstance(sys.exception(), ClusterStopped):
            self._stack.pop_all()  # Ray's shutdown would end this process, or wait for the cluster
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
        except Exception as error:  # Ray raises bare ones, too
            if self.address == LOCAL:
                raise ConfigError(
                    f"Ray cannot be started on this machine: {error}; remove the cause, or use --runner serial"
                ) from error
            raise ConfigError(f"the Ray cluster at {self.address} cannot be joined: {error}; {WAY_OUT}") from error
        return cluster_resources


_lock = threading.Lock()
_connection: _Connection | None = None
"""Of this process."""


@contextmanager
def connect(address: str | None) -> Iterator[Callable[[], Resources]]:
    """Joins a Ray cluster, or starts a local one, for the length of a `with` block, beside what is done in it.

    Threads share a connection, which ends with the last of them. A process that was connected before stays so.

    Args:
        address: A cluster's address; `local` for a new Ray on this machine; None for RAY_ADDRESS, or else the cluster
            that `ray start` started on this machine, or else a new Ray; `auto` for the same without the last.

    Yields:
        A function that waits until Ray has started, and returns one for the cluster's resources. Either may raise.

    Raises:
        ConfigError: The cluster cannot be reached, or the platform has no Ray runner.
    """
    global _connection
    if sys.platform != "linux":
        raise ConfigError(f"the Ray runner needs Linux (platform: {sys.platform}); use --runner serial")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
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
            connection.users += 1
    if not connection:
        yield lambda: cluster_resources
        return

    try:
        yield connection.wait
    finally:
        with _lock:
            connection.users -= 1
            if not connection.users:
                _connection = None
                connection.close()


def cluster_probe() -> Callable[[], bool]:
    """Returns a function that says whether the cluster, and this machine's node of it, still accept connections."""
    import ray

    context = ray.get_runtime_context()
    own = [node for node in alive_nodes() if node["NodeID"] == context.get_node_id()]
    raylets = [f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in own]
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
    """Says whether this process is part of a Ray cluster."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # missing while another thread imports Ray
    return bool(is_initialized and is_initialized())


def num_nodes(resources: dict[str, float]) -> int:
    """Returns the number of nodes of a cluster, given its resources."""
    return max(1, sum(name.startswith("node:") and not name.endswith("_head__") for name in resources))


def alive_nodes() -> list[dict[str, Any]]:
    """Returns the cluster's nodes, as Ray describes them.

    Raises:
        ConfigError: None is alive.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not nodes:
        raise ConfigError("the Ray cluster was stopped (nodes alive: 0); start it again")
    return nodes


def cluster_resources(device: str = "auto") -> dict[str, float]:
    """Returns the totals of the cluster that is joined: `CPU`, and `GPU` where torch can use one.

    Args:
        device: As in `pipeline.device`. With `cpu`, GPUs are not checked.
    """
    import ray

    resources: dict[str, float] = {"CPU": 0.0, "GPU": 0.0, **ray.cluster_resources()}  # a head may have none
    if has_autoscaler():
        resources[AUTOSCALER] = 1.0
    if resources["GPU"] and device != "cpu":
        resources["GPU"] = _usable_gpus()
    return resources


def has_autoscaler() -> bool:
    """Returns whether the cluster has an autoscaler, which adds nodes for what waits to be placed.

    Its report names types of nodes as its configuration does. Without one, Ray reports a type for each node.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    return any(not name.startswith("node_") for name in report.get("active_nodes", {}))


_torch_has_cuda: dict[str, bool] = {}
"""Whether torch can use the GPUs of a node, by its id. Ids are unique, and what is installed does not change."""


def _usable_gpus() -> float:
    """Returns the number of GPUs that torch can use.

    Ray counts GPUs by their driver, so a task on each node asks torch. It takes a small share of a GPU, because others
    may hold the rest.

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
        ray.remote(num_gpus=GPU_SHARE, num_cpus=0, max_retries=0)(probe)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(): node
        for node, number in gpus.items()
        if number and node not in _torch_has_cuda
    }
    if tasks:
        answered, waiting = ray.wait(list(tasks), num_returns=len(tasks), timeout=PROBE_TIMEOUT_S)
        for task in waiting:
            ray.cancel(task, force=True)
        for task in answered:
            try:
                _torch_has_cuda[tasks[task]] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise ConfigError(
                    f"a node with GPUs cannot use torch ({error.cause!r}); install the same torch on all nodes, or set "
                    f"pipeline.device to cpu"
                ) from error
            except ray.exceptions.RayError:  # the node was lost
                continue
    known = [node for node, number in gpus.items() if number and node in _torch_has_cuda]
    usable = [node for node in known if _torch_has_cuda[node]]
    if not known or (usable and usable != known):
        reason = (
            f"torch can use the GPUs of {len(usable)} of {len(known)} nodes; install the same torch on all nodes"
            if known
            else f"{GPU_SHARE} of a GPU was not free within {PROBE_TIMEOUT_S:g} s; wait until other jobs are done"
        )
        raise ConfigError(f"{reason}, or set pipeline.device to cpu")
    return float(sum(gpus[node] for node in usable))


def machine_resources(device: str = "auto") -> dict[str, float]:
    """Returns the totals of this machine, in the same terms."""
    import torch

    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def check_object_store(*, images: int, in_flight: int) -> None:
    """Checks that what lies in it at once fills at most half of the smallest object store among the cluster's nodes.

    Args:
        images: Bytes of all splits.
        in_flight: Bytes of messages and states under way.

    Raises:
        ConfigError: It would fill more.
    """
    store = int(min(node["Resources"].get("object_store_memory", 0) for node in alive_nodes()))
    if images + in_flight > store / 2:
        raise ConfigError(
            f"a run may fill half of Ray's object store (images: {images:,} bytes, chunks in flight: {in_flight:,}, "
            f"half of the store: {store // 2:,}); set pipeline.chunk_size, pipeline.max_in_flight or negatives.ahead "
            f"lower, or start Ray with a larger --object-store-memory"
        )
