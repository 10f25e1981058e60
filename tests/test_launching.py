"""The cluster files, and `ray up` and `ray submit` as they are, over a real sshd on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import yaml
from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
LAUNCHED = sorted(path for path in (ROOT / "cluster").glob("*.yaml") if path.stem != "kuberay")
JOB_FIELDS = {  # of ray.io/v1, KubeRay 1.5
    "RayJobSpec": (
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
        "entrypointNumGpus entrypointResources jobId managedBy metadata rayClusterSpec runtimeEnvYAML "
        "shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished"
    ),
    "RayClusterSpec": (
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
        "headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs"
    ),
    "AutoscalerOptions": (
        "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version "
        "volumeMounts"
    ),
    "HeadGroupSpec": "enableIngress headService labels rayStartParams resources serviceType template",
    "WorkerGroupSpec": (
        "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas resources "
        "scaleStrategy suspend template"
    ),
}


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_cluster_files_are_those_of_rays_launcher(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["~/configs"] == "configs"
    mounted = {ROOT / here for here in config["file_mounts"].values() if not here.startswith("~")}
    assert all(here.exists() for here in mounted)
    assert mounted >= {ROOT / "pyproject.toml", ROOT / "ffdist"}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert sum("RAY_AUTH_MODE=token" in command for command in starts) == 2
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)
    assert not any("-e " in command for command in config["setup_commands"]), "a plain install"


def test_the_job_of_kuberay_has_its_published_fields():
    text = (ROOT / "cluster" / "kuberay.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    parts = {
        "RayJobSpec": job["spec"],
        "RayClusterSpec": cluster,
        "AutoscalerOptions": cluster["autoscalerOptions"],
        "HeadGroupSpec": cluster["headGroupSpec"],
        "WorkerGroupSpec": cluster["workerGroupSpecs"][0],
    }
    for name, part in parts.items():
        assert set(part) <= set(JOB_FIELDS[name].split()), name
    assert cluster["authOptions"] == {"mode": "token"}
    containers = [
        container
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    ]
    assert all(set(container) - {"env", "envFrom"} == {"name", "image", "resources"} for container in containers)
    for source in containers[0]["envFrom"]:
        assert f"kubectl create secret generic {source['secretRef']['name']} " in text, "the head never starts without"
    yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["MLFLOW_TRACKING_URI"]


def test_all_machines_get_the_same_torch():
    pins = {path.name: re.findall(r" torch==\S+", path.read_text()) for path in (ROOT / "cluster").glob("*.yaml")}
    assert len({*map(tuple, pins.values())}) == 1, pins
    assert all(pins.values())


@pytest.fixture
def machines(tmp_path, free_port, ray_folder, monkeypatch):
    """Two machines that are reached by ssh, 127.0.0.1 and 127.0.0.2: an sshd whose users have a throwaway home on each.

    Yields the homes, what a cluster file says of the way there, and the command that knows it.
    """
    if not (shutil.which("sshd", path="/usr/sbin:/usr/bin") and shutil.which("rsync")):
        pytest.skip("sshd or rsync is missing; install openssh-server and rsync")
    homes, keys = (tmp_path / "home", tmp_path / "worker"), tmp_path / "keys"
    for home in homes:
        home.mkdir()
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    settings = {
        "Port": free_port,
        "ListenAddress": "0.0.0.0",
        "HostKey": keys / "host",
        "AuthorizedKeysFile": keys / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
    }
    lines = [f"{name} {value}\n" for name, value in settings.items()]
    for number, home in enumerate(homes, 1):
        known = f"HOME={home} PATH={os.environ['PATH']} RAY_TMPDIR={ray_folder}"  # where it looks for a cluster
        lines.append(f"Match LocalAddress 127.0.0.{number}\nSetEnv {known}\n")
    (keys / "sshd").write_text("".join(lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it separates its privileges
    daemon = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", keys / "sshd"], stderr=(keys / "log").open("w"))
    ssh = keys / "ssh"  # ray knows no port of it, and it knows no other home than the user's
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -p {free_port} -i {keys / "user"} "$@"\n')
    ssh.chmod(0o700)
    monkeypatch.setenv("PATH", f"{keys}:{os.environ['PATH']}")
    auth = {"ssh_user": psutil.Process().username(), "ssh_private_key": str(keys / "user")}
    try:
        yield *homes, auth, ssh
    finally:
        daemon.kill()
        for home in homes:
            end_processes_of(home)


@pytest.fixture
def ray_folder():
    """One whose sockets have names as short as they must be."""
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def end_processes_of(home: Path) -> None:
    """Where `ray stop` would end all of this user's; some of Ray's write their names over their environment."""
    doomed = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                doomed |= {process, *process.children(recursive=True)}
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()


@pytest.mark.slow
def test_ray_up_and_submit(machines, ray_folder, tmp_path):
    """Ends in a run on both machines with the digest of a local one; one that fails and Ctrl-C have their exit code.

    `pytest -rP` shows what was said.
    """
    home, _, auth, ssh = machines
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    config |= {"provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": ["127.0.0.2"]}, "auth": auth}
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    config["file_mounts"]["~/.ray/auth_token"] = str(tmp_path / "token")
    guard, make, install, path, *_ = config["setup_commands"]
    here = next(folder for folder in sys.path if folder.endswith("site-packages"))
    site = f"~/ffdist-env/lib/python3.{sys.version_info.minor}/site-packages"
    ray_script = '#!/bin/sh\nexec ~/ffdist-env/bin/python -m ray.scripts.scripts "$@"\n'
    config["setup_commands"] = [  # all that the package needs is here already, 6.5 GB of it
        guard,
        make.replace("python3", sys.executable),
        f"echo {here} > {site}/here.pth",
        f"printf {shlex.quote(ray_script)} > ~/ffdist-env/bin/ray; chmod +x ~/ffdist-env/bin/ray",
        f"ln -sf {ssh} ~/ffdist-env/bin/ssh",
        f"{install.partition(' ray==')[0]} --no-deps",
        path,
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    stop, start = config["head_start_ray_commands"]
    assert stop == "~/ffdist-env/bin/ray stop", "which would end all of this user's Ray"
    assert stop == config["worker_start_ray_commands"][0]
    start = start.replace("--port=6379", f"--port={port} --ray-client-server-port={port + 1}")
    own = "--num-cpus=2 --dashboard-agent-listen-port"
    config["head_start_ray_commands"] = [f"{start} --node-ip-address=127.0.0.1 {own}={port + 2}"]
    start = config["worker_start_ray_commands"][1].replace(":6379", f":{port}")
    config["worker_start_ray_commands"] = [f"{start} --node-ip-address=127.0.0.2 {own}={port + 3}"]
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(config))

    def ray(*words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        command, began = [sys.executable, "-m", "ray.scripts.scripts", *words], time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        took = f"exit code {done.returncode} after {time.monotonic() - began:.1f} s"
        print(f"$ ray {shlex.join(words)}\n{done.stdout}{done.stderr}{took}\n")
        return done

    up = ray("up", str(file), "-y", "--no-config-cache")
    assert up.returncode == 0
    assert (home / "configs" / "digits.yaml").is_file()
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o77 == 0
    deadline = time.monotonic() + 180
    while (
        "/4.0 CPU" not in ray("exec", str(file), f"ray status --address=127.0.0.1:{port}").stdout
    ):  # the head starts the worker
        assert time.monotonic() < deadline, "the worker does not come"
        time.sleep(5)  # asking takes a processor as well
    short = ["training.epochs=2", "--runs", str(tmp_path / "runs"), "--summary", str(tmp_path / "far.json")]
    submitted = ray("submit", str(file), "ffdist/run.py", "--", "digits", *short)
    assert submitted.returncode == 0
    near = [sys.executable, "-m", "ffdist.cli", "train", "digits", "--runner", "serial", "training.epochs=2"]
    near += ["--runs", str(tmp_path / "near"), "--summary", str(tmp_path / "near.json")]
    subprocess.run(near, check=True, capture_output=True, timeout=200)
    far, near = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("far", "near"))
    assert far["weights_sha256"] == near["weights_sha256"]
    assert (far["runner"], near["runner"]) == ("ray", "serial")
    assert far["weights_sha256"] in submitted.stdout
    assert "0.5 CPU each" in submitted.stdout  # of the cluster's four for five actors
    words = ["digits", "training.epochs=100000", "checkpoint.every_minibatches=50", "--runs", str(tmp_path / "stopped")]
    command = [sys.executable, "-m", "ray.scripts.scripts", "submit", str(file), "ffdist/run.py", "--", *words]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # which a shell may have ignored
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeding, **more) as stopped:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("stopped/digits-*/checkpoints/*/manifest.json")):
            assert stopped.poll() is None, stopped.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        stopped.send_signal(signal.SIGINT)
        said, _ = stopped.communicate(timeout=60)
    print(f"$ ray submit ...  # and Ctrl-C\n{said}exit code {stopped.returncode}\n")
    assert stopped.returncode == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/stopped/mlflow.db")
    while client.search_runs(["1"])[0].info.status == "RUNNING" and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    assert client.search_runs(["1"])[0].info.status == "KILLED"
    failed = ray("submit", str(file), "ffdist/run.py", "--", "digits", "training.epochs=none")
    assert failed.returncode == 1
    assert "training.epochs" in failed.stdout + failed.stderr


@pytest.mark.slow
def test_a_job_over_two_nodes(ray_folder, tmp_path):
    """Nodes by `ray start`, a run by `ray job submit`: stages on both nodes, and the digest of one process."""
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, dashboard = (server.getsockname()[1] for server in ports)
    for server in ports:
        server.close()
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def run(*words: object) -> str:
        command = [sys.executable, "-m", *map(str, words)]
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
            )
            if "No available agent" not in done.stderr or time.monotonic() > deadline:  # it takes a while to start
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ray, layers = "ray.scripts.scripts", "model.layers=[60,50,40,30,20]"  # a quarter of a CPU for each of seven actors
    short = ["digits", "training.epochs=2", layers, "--runs", tmp_path / "runs"]
    head = [
        "--head",
        f"--port={port}",
        f"--dashboard-agent-listen-port={port + 2}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    try:
        run(ray, "start", *head, f"--ray-client-server-port={port + 1}", "--num-cpus=1", f"--temp-dir={ray_folder}")
        run(ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", f"--dashboard-agent-listen-port={port + 3}")
        address = f"--address=http://127.0.0.1:{dashboard}"
        far = ["--summary", tmp_path / "far.json"]
        told = run(ray, "job", "submit", address, "--", sys.executable, "-m", "ffdist.run", *short, *far)
        assert "succeeded" in told
        listed = json.loads(run(ray, "list", "actors", address, "--format=json", "--detail"))
        nodes = {actor["node_id"] for actor in listed if actor["class_name"].startswith("Stage")}
        assert len(nodes) == 2, listed
        run("ffdist.cli", "train", *short, "--runner", "serial", "--summary", tmp_path / "near.json")
    finally:
        end_processes_of(home)
    far, near = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("far", "near"))
    assert far["weights_sha256"] == near["weights_sha256"]
