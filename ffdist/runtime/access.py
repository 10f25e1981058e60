"""Access to Ray clusters: private local ones, the address to join, and authentication."""

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

from ffdist.errors import ConfigError
from ffdist.signals import STOP_SIGNALS

CONNECT_TIMEOUT_S = 5.0
MAX_FOLDER_BYTES = 24
"""Maximum length of the path of Ray's folder. Ray appends up to 83 bytes, and Linux limits socket paths to 107."""

LOCAL = "local"
CONNECT_FIX = "start the cluster, or set --address to another one or to local"
TOKEN_FIX = "copy the cluster's token to ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH to a file that holds it"


@contextmanager
def private_ray() -> Iterator[Path]:
    """Makes Ray clusters that are started in the `with` block accessible to this user only.

    A new folder holds their token, sockets, logs and address. Ray's default folder may belong to another user, its path
    may be too long for a socket, and other commands search it for a cluster to join. Processes that are started in the
    block inherit the settings.

    Yields:
        The folder. Only this user can read it, and it is removed at the end.

    Raises:
        ConfigError: No folder for temporary files is writable and has a path of at most `MAX_FOLDER_BYTES`.
    """
    folder = _make_ray_folder()
    try:
        token = folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,  # it would take precedence over the path
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with set_environment(variables):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_ray_folder() -> Path:
    """Creates an empty folder with a short path."""
    ray_tmpdir = os.environ.get("RAY_TMPDIR")
    parents = [ray_tmpdir] if ray_tmpdir else [os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp"]
    for parent in parents:
        with suppress(OSError):  # not writable, or full
            if len(os.fsencode(parent)) <= MAX_FOLDER_BYTES:
                return Path(mkdtemp(prefix="ray", dir=Path(parent).absolute()))
    raise ConfigError(
        f"Ray needs a writable folder whose path has at most {MAX_FOLDER_BYTES} bytes (tried: "
        f"{', '.join(dict.fromkeys(parents))}); set RAY_TMPDIR to one"
    )


@contextmanager
def set_environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Sets environment variables in the `with` block, and makes Ray reload its cached authentication settings.

    Args:
        variables: Values by name; None removes a variable.
    """
    raylet: Any = import_module("ray._raylet")
    previous = {name: os.environ.get(name) for name in variables}

    def apply(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        raylet.Config.initialize("")  # first, because a Ray thread that still runs may look for a removed token
        raylet.AuthenticationTokenLoader.instance().reset_cache()

    apply(variables)
    try:
        yield
    finally:
        apply(previous)


def job_options() -> dict[str, Any]:
    """Returns the options of every `ray.init` call.

    `_client_job` keeps Ray from putting the working directory on the workers' import path, before installed packages.
    It has no other effect.
    """
    import ray

    return {"logging_level": logging.ERROR, "job_config": ray.job_config.JobConfig(_client_job=True)}


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """Starts Ray on this machine, accessible to this user only, and shuts it down at the end of the `with` block."""
    import ray

    constants: Any = import_module("ray._private.ray_constants")
    with private_ray():
        constants.ENABLE_RAY_CLUSTER = False  # otherwise Ray replaces 127.0.0.1 by the machine's network address
        try:
            with _shield_processes():
                ray.init("local", _node_ip_address="127.0.0.1", include_dashboard=False, **job_options(), **options)
        finally:
            constants.ENABLE_RAY_CLUSTER = True
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _shield_processes() -> Iterator[None]:
    """Shields the Ray processes that are started in the `with` block from signals that are meant to stop the run.

    `timeout`, systemd and Slurm signal the driver's process group, or every process of the job. Ray's processes must
    survive that, because the last checkpoint is taken from its actors. Each process gets its own session and a signal
    mask that blocks these signals. Its workers inherit the mask.
    """
    services: Any = import_module("ray._private.services")  # there is no public API for this
    popen: type[Any] = services.ConsolePopen

    class ShieldedPopen(popen):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, start_new_session=True)

        def terminate(self) -> None:  # called by ray.shutdown(); SIGTERM is blocked, and everything is saved by then
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
    """Returns the address of the cluster to join, or `local` to start one; see `connect` for the argument.

    Raises:
        ConfigError: The cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address == LOCAL:
        return LOCAL
    if address not in (None, "auto"):
        _check_reachable(address, CONNECT_FIX)
        return address
    # Ray's own search also accepts a cluster that another program started for itself, and a file of another user.
    file = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        current = file.read_text().strip() if file.stat().st_uid in (0, os.getuid()) else ""
    except OSError:
        current = ""
    if current:
        _check_reachable(current, f"start it again by `ray start`, or set --address (the address is from {file})")
    elif address == "auto":
        raise ConfigError(
            f"no cluster was started on this machine by `ray start` ({file} has no address); {CONNECT_FIX}"
        )
    return current or LOCAL


def _check_reachable(address: str, fix: str) -> None:
    """Checks that a port accepts connections, because Ray would retry for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"a run's driver must be on a node of the cluster, without Ray Client (address: {address}); use "
            f"`ray submit` or HOST:PORT"
        )
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
    """Enables token authentication in the `with` block if the cluster requires it, unless RAY_AUTH_MODE is set.

    It is not enabled for other clusters, because a driver that requires a token rejects their calls.

    Raises:
        ConfigError: The cluster does not answer, or rejects this process.
    """
    has_token = import_module("ray._raylet").AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    auth_mode = os.environ.get("RAY_AUTH_MODE")
    if auth_mode == "token" and not has_token:
        raise ConfigError(f"RAY_AUTH_MODE=token needs a token, and there is none; {TOKEN_FIX}")
    for mode in [auth_mode] if auth_mode else [None, "token"] if has_token else [None]:
        with set_environment({"RAY_AUTH_MODE": mode}):
            if not _rejects_token(address):
                yield
                return
    raise ConfigError(
        f"the Ray cluster at {address} needs a token, and this process has none or another (RAY_AUTH_MODE: "
        f"{auth_mode or 'not set'}); {TOKEN_FIX}"
    )


def _rejects_token(address: str) -> bool:
    """Returns whether a cluster rejects this process's token, or the lack of one. Ray would retry for a minute."""
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
            raise ConfigError(f"no Ray cluster answers at {address} ({error.details()}); {CONNECT_FIX}") from error
    return False
