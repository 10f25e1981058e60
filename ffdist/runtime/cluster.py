"""Joining a Ray cluster, and what it has."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from ffdist.config import ConfigError

CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
Resources = Callable[[], dict[str, float]]
"""Tells the totals of what there is."""

WAY_OUT = "correct --address or RAY_ADDRESS, or leave both out to start a local Ray"


@contextmanager
def connect(address: str | None) -> Iterator[Callable[[], Resources]]:
    """Joins a Ray cluster, or starts a local one, for the length of a `with` block, beside what is done in it.

    A process that is connected already stays so, before, during and after.

    Args:
        address: A cluster's address; `local` for a Ray of one's own; None for the cluster that this machine is part
            of, or a Ray of one's own where there is none.

    Yields:
        What waits until that is done, and returns what tells the resources; it, too, may raise.

    Raises:
        ConfigError: The cluster cannot be reached, or the platform has no Ray runner.
    """
    if sys.platform != "linux":
        raise ConfigError(f"the Ray runner needs Linux (platform: {sys.platform}); use --runner serial")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield lambda: cluster_resources
        return
    if address and ":" in address:
        _check_reachable(address)
    with ThreadPoolExecutor(1) as beside:  # whose thread must outlive Ray's processes, or the kernel ends them with it
        hearing = _deaf_to_hangups()
        joining = beside.submit(_join, address)

        def joined() -> Resources:
            with hearing:
                return joining.result()

        try:
            yield joined
        finally:
            if not joining.exception():  # waits
                sys.modules["ray"].shutdown()
            hearing.close()


def _deaf_to_hangups() -> ExitStack:
    """Ignores that the terminal goes, and returns what ends that; processes that are started in it go on ignoring it.

    Ray's must not be gone with the terminal before their driver has taken its leave of them.
    """
    hearing = ExitStack()
    if threading.current_thread() is threading.main_thread():
        hearing.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
    return hearing


def _join(address: str | None) -> Resources:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, include_dashboard=False if address == "local" else None)
    except Exception as error:  # Ray raises bare ones, too
        raise ConfigError(f"Ray cannot be reached or started at {address}: {error}; {WAY_OUT}") from error
    return cluster_resources


def _check_reachable(address: str) -> None:
    """Asks a port before Ray does, which would go on asking for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(f"a run's driver is part of the cluster (address: {address}); use `ray submit` or HOST:PORT")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}); {WAY_OUT}") from error


def cluster_resources() -> dict[str, float]:
    """Returns the totals of the cluster that is joined: `CPU`, and `GPU` where torch can use one.

    Ray counts GPUs by their driver; whether the installed torch works with them is asked in a worker that holds one.
    """
    import ray

    resources: dict[str, float] = {"CPU": 0.0, **ray.cluster_resources()}  # a head may have none
    if resources.get("GPU") and not _torch_has_cuda():
        resources["GPU"] = 0
    return resources


def _torch_has_cuda() -> bool:
    import ray

    def probe() -> bool:
        import torch

        return torch.cuda.is_available()

    answer = ray.remote(num_gpus=1, num_cpus=0, max_retries=0)(probe).remote()
    try:
        return bool(ray.get(answer, timeout=PROBE_TIMEOUT_S))
    except ray.exceptions.RayError as error:
        ray.cancel(answer, force=True)
        raise ConfigError(
            f"no GPU of the cluster got free within {PROBE_TIMEOUT_S:g} s to ask whether torch can use it "
            f"({type(error).__name__}); set pipeline.device to cpu, or wait until others are done"
        ) from error


def machine_resources() -> dict[str, float]:
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
    import ray

    store = int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))
    if images + in_flight > store / 2:
        raise ConfigError(
            f"a run may fill half of Ray's object store (images: {images:,} bytes, chunks in flight: {in_flight:,}, "
            f"half of the store: {store // 2:,}); set pipeline.chunk_size, pipeline.max_in_flight or negatives.ahead "
            f"lower, or start Ray with a larger --object-store-memory"
        )
