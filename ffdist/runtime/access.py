"""Finding Ray clusters, and being the only user of one."""

import logging
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ffdist.config import ConfigError
from ffdist.interrupts import STOP_SIGNALS

CONNECT_TIMEOUT_S = 5.0
MAX_FOLDER_BYTES = 24
"""Longest path that holds a Ray folder: Ray adds up to 83 bytes, and Linux allows 107 for the name of a socket."""

LOCAL = "local"
WAY_OUT = "start the cluster, or set --address to another one or to local"
TOKEN_FIX = "copy the cluster's token to ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH to a file that holds it"


@contextmanager
def private_ray() -> Iterator[Path]:
    """Sets up this process to start Ray clusters that only its user can join, for the length of a `with` block.

    A new folder holds their token, sockets, logs and address. Ray's default folder may belong to another user, its path
    may be too long for a socket, and other commands look there for a cluster to join. Processes that are started in the
    block inherit the settings.

    Yields:
        The folder, which is removed at the end. No other user can read it.

    Raises:
        ConfigError: No folder for temporary files is writable and has a short path.
    """
    folder = _make_ray_folder()
    try:
        token = folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,  # it would take precedence
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with environment(settings):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_ray_folder() -> Path:
    """Makes an empty folder with a short path."""
    chosen = os.environ.get("RAY_TMPDIR")
    parents = [chosen] if chosen else [os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp"]
    for parent in parents:
        with suppress(OSError):  # not writable, or full
            if len(os.fsencode(parent)) <= MAX_FOLDER_BYTES:
                return Path(mkdtemp(prefix="ray", dir=Path(parent).absolute()))
    raise ConfigError(
        f"Ray needs a writable folder whose path has at most {MAX_FOLDER_BYTES} bytes (tried: "
        f"{', '.join(dict.fromkeys(parents))}); set RAY_TMPDIR to one"
    )


@contextmanager
def environment(settings: dict[str, str | None]) -> Iterator[None]:
    """Sets environment variables, and has Ray read its authentication settings again, which it caches otherwise."""
    raylet: Any = import_module("ray._raylet")
    before = {name: os.environ.get(name) for name in settings}

    def apply(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        raylet.Config.initialize("")  # first, or a thread of Ray that still runs may look for a removed token
        raylet.AuthenticationTokenLoader.instance().reset_cache()

    apply(settings)
    try:
        yield
    finally:
        apply(before)


def job_options() -> dict[str, Any]:
    """Returns what each `ray.init` gets.

    Ray would put the working directory on the import path of workers, before installed packages, if the job were not
    marked as one of Ray Client, which only leaves that out.
    """
    import ray

    return {"logging_level": logging.ERROR, "job_config": ray.job_config.JobConfig(_client_job=True)}


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """Starts a Ray on this machine that only its user can join, for the length of a `with` block."""
    import ray

    constants: Any = import_module("ray._private.ray_constants")
    with private_ray():
        constants.ENABLE_RAY_CLUSTER = False  # or Ray replaces 127.0.0.1 by the machine's address in the network
        try:
            with _shielded_processes():
                ray.init("local", _node_ip_address="127.0.0.1", include_dashboard=False, **job_options(), **options)
        finally:
            constants.ENABLE_RAY_CLUSTER = True
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _shielded_processes() -> Iterator[None]:
    """Starts Ray's processes so that stop signals meant for the run do not reach them.

    `timeout`, systemd and Slurm signal the driver's process group, or every process of the job. Ray's processes must
    outlive that, or there is nothing left to take the last checkpoint from. Each gets its own session, and inherits a
    signal mask that blocks these signals; so do the workers that it starts.
    """
    services: Any = import_module("ray._private.services")  # there is no public way
    popen: type[Any] = services.ConsolePopen

    class ShieldedPopen(popen):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, start_new_session=True)

        def terminate(self) -> None:  # Ray's shutdown; SIGTERM is blocked, and after it nothing is left to save
            if self.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)

    services.ConsolePopen = ShieldedPopen
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        services.ConsolePopen = popen


def find_cluster(address: str | None) -> str:
    """Returns the address of the cluster to join, or `local`.

    Raises:
        ConfigError: It cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address == LOCAL:
        return LOCAL
    if address not in (None, "auto"):
        _check_reachable(address, WAY_OUT)
        return address
    # Ray would also take a cluster that another program started for itself, or a file that another user put there.
    file = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        started = file.read_text().strip() if file.stat().st_uid in (0, os.getuid()) else ""
    except OSError:
        started = ""
    if started:
        _check_reachable(started, f"start it again by `ray start`, or set --address (that address is from {file})")
    elif address == "auto":
        raise ConfigError(f"no cluster was started on this machine by `ray start` ({file} has no address); {WAY_OUT}")
    return started or LOCAL


def _check_reachable(address: str, fix: str) -> None:
    """Asks a port before Ray does, which would go on asking for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(f"a run's driver is part of the cluster (address: {address}); use `ray submit` or HOST:PORT")
    if "://" in address:
        raise ConfigError(
            f"{address} is the address of Ray's dashboard and jobs, not of a cluster; use `ray job submit --address "
            f"{address} -- python -m ffdist.run ...`, or the HOST:PORT that `ray start` printed"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}); {fix}") from error


@contextmanager
def cluster_token(address: str) -> Iterator[None]:
    """Uses this user's token if a cluster needs one, unless RAY_AUTH_MODE is set.

    A driver that asks for a token cannot be called back by a cluster that has none.

    Raises:
        ConfigError: The cluster does not answer, or refuses this process.
    """
    has_token = import_module("ray._raylet").AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    chosen = os.environ.get("RAY_AUTH_MODE")
    if chosen == "token" and not has_token:
        raise ConfigError(f"RAY_AUTH_MODE is token, and there is no token; {TOKEN_FIX}")
    for mode in [chosen] if chosen else [None, "token"] if has_token else [None]:
        with environment({"RAY_AUTH_MODE": mode}):
            if not _is_refused(address):
                yield
                return
    raise ConfigError(
        f"the Ray cluster at {address} needs a token, and this process has none or another (RAY_AUTH_MODE: "
        f"{chosen or 'not set'}); {TOKEN_FIX}"
    )


def _is_refused(address: str) -> bool:
    """Asks a cluster once whether it takes the token, or none; Ray would repeat the question for a minute."""
    import grpc

    messages: Any = import_module("ray.core.generated.gcs_service_pb2")
    services: Any = import_module("ray.core.generated.gcs_service_pb2_grpc")
    with import_module("ray._private.grpc_utils").init_grpc_channel(address) as channel:
        try:
            service = services.NodeInfoGcsServiceStub(channel)
            service.GetClusterId(messages.GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise ConfigError(f"no Ray cluster answers at {address} ({error.details()}); {WAY_OUT}") from error
    return False
