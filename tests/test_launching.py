"""The cluster files, and `ray up` and `ray submit` over a real sshd on this machine."""

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
JOB_FIELDS = {  # fields of ray.io/v1 in KubeRay 1.5
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
def test_cluster_files_are_valid_for_the_ray_launcher(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["~/configs"] == "configs"
    sources = {ROOT / source for source in config["file_mounts"].values() if not source.startswith("~")}
    assert all(source.exists() for source in sources)
    assert sources >= {ROOT / "pyproject.toml", ROOT / "ffdist"}
    start_commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert sum("RAY_AUTH_MODE=token" in command for command in start_commands) == 2
    assert any("--dashboard-host=127.0.0.1" in command for command in start_commands)
    assert not any("-e " in command for command in config["setup_commands"]), "a plain install"


def test_kuberay_job_has_only_published_fields():
    text = (ROOT / "cluster" / "kuberay.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    sections = {
        "RayJobSpec": job["spec"],
        "RayClusterSpec": cluster,
        "AutoscalerOptions": cluster["autoscalerOptions"],
        "HeadGroupSpec": cluster["headGroupSpec"],
        "WorkerGroupSpec": cluster["workerGroupSpecs"][0],
    }
    for name, section in sections.items():
        assert set(section) <= set(JOB_FIELDS[name].split()), name
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


def test_all_cluster_files_install_the_same_torch():
    pins = {path.name: re.findall(r" torch==\S+", path.read_text()) for path in (ROOT / "cluster").glob("*.yaml")}
    assert len({*map(tuple, pins.values())}) == 1, pins
    assert all(pins.values())


@pytest.fixture
def machines(tmp_path, free_port, ray_folder, monkeypatch):
    """Two machines, 127.0.0.1 and 127.0.0.2: an sshd that gives the user a temporary home folder on each.

    Yields the home folders, the section `auth` of a cluster file, and the path of the ssh command.
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
        # Ray looks for a cluster in RAY_TMPDIR.
        variables = f"HOME={home} PATH={os.environ['PATH']} RAY_TMPDIR={ray_folder}"
        lines.append(f"Match LocalAddress 127.0.0.{number}\nSetEnv {variables}\n")
    (keys / "sshd").write_text("".join(lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # for privilege separation
    daemon = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", keys / "sshd"], stderr=(keys / "log").open("w"))
    ssh = keys / "ssh"  # adds the port, which Ray cannot set, and the key, because ssh ignores HOME
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -p {free_port} -i {keys / "user"} "$@"\n')
    ssh.chmod(0o700)
    monkeypatch.setenv("PATH", f"{keys}:{os.environ['PATH']}")
    auth = {"ssh_user": psutil.Process().username(), "ssh_private_key": str(keys / "user")}
    try:
        yield *homes, auth, ssh
    finally:
        daemon.kill()
        for home in homes:
            kill_processes_of(home)


@pytest.fixture
def ray_folder():
    """A folder whose path is short enough for Ray's sockets."""
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def kill_processes_of(home: Path) -> None:
    """Kills the processes with this home folder. `ray stop` would end all Ray processes of this user.

    Their children are killed, too, because some Ray processes overwrite their environment.
    """
    processes = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                processes |= {process, *process.children(recursive=True)}
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


@pytest.mark.slow
def test_ray_up_and_submit(machines, ray_folder, tmp_path):
    """A run on both machines gives the weights of a local run. A failed and an interrupted run set the exit code.

    `pytest -rP` shows the output.
    """
    home, _, auth, ssh = machines
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    config |= {"provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": ["127.0.0.2"]}, "auth": auth}
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    config["file_mounts"]["~/.ray/auth_token"] = str(tmp_path / "token")
    chmod, create_venv, install, set_path, *_ = config["setup_commands"]
    site_packages = next(folder for folder in sys.path if folder.endswith("site-packages"))
    venv_packages = f"~/ffdist-env/lib/python3.{sys.version_info.minor}/site-packages"
    ray_script = '#!/bin/sh\nexec ~/ffdist-env/bin/python -m ray.scripts.scripts "$@"\n'
    config["setup_commands"] = [  # reuses the installed dependencies, 6.5 GB, instead of a download
        chmod,
        create_venv.replace("python3", sys.executable),
        f"echo {site_packages} > {venv_packages}/here.pth",
        f"printf {shlex.quote(ray_script)} > ~/ffdist-env/bin/ray; chmod +x ~/ffdist-env/bin/ray",
        f"ln -sf {ssh} ~/ffdist-env/bin/ssh",
        f"{install.partition(' ray==')[0]} --no-deps",
        set_path,
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    stop, start = config["head_start_ray_commands"]
    assert stop == "~/ffdist-env/bin/ray stop", "which would end all of this user's Ray"
    assert stop == config["worker_start_ray_commands"][0]
    start = start.replace("--port=6379", f"--port={port} --ray-client-server-port={port + 1}")
    node_options = "--num-cpus=2 --dashboard-agent-listen-port"
    config["head_start_ray_commands"] = [f"{start} --node-ip-address=127.0.0.1 {node_options}={port + 2}"]
    start = config["worker_start_ray_commands"][1].replace(":6379", f":{port}")
    config["worker_start_ray_commands"] = [f"{start} --node-ip-address=127.0.0.2 {node_options}={port + 3}"]
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(config))

    def ray(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        command, start_time = [sys.executable, "-m", "ray.scripts.scripts", *arguments], time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        status = f"exit code {result.returncode} after {time.monotonic() - start_time:.1f} s"
        print(f"$ ray {shlex.join(arguments)}\n{result.stdout}{result.stderr}{status}\n")
        return result

    up_result = ray("up", str(file), "-y", "--no-config-cache")
    assert up_result.returncode == 0
    assert (home / "configs" / "digits.yaml").is_file()
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o77 == 0
    deadline = time.monotonic() + 180
    while (
        "/4.0 CPU" not in ray("exec", str(file), f"ray status --address=127.0.0.1:{port}").stdout
    ):  # the head starts the worker
        assert time.monotonic() < deadline, "the worker does not come"
        time.sleep(5)  # `ray status` needs a CPU, too
    run_options = ["training.epochs=2", "--runs", str(tmp_path / "runs"), "--summary", str(tmp_path / "far.json")]
    submit_result = ray("submit", str(file), "ffdist/run.py", "--", "digits", *run_options)
    assert submit_result.returncode == 0
    local_command = [sys.executable, "-m", "ffdist.cli", "train", "digits", "--runner", "serial", "training.epochs=2"]
    local_command += ["--runs", str(tmp_path / "near"), "--summary", str(tmp_path / "near.json")]
    subprocess.run(local_command, check=True, capture_output=True, timeout=200)
    cluster_summary, local_summary = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("far", "near"))
    assert cluster_summary["weights_sha256"] == local_summary["weights_sha256"]
    assert (cluster_summary["runner"], local_summary["runner"]) == ("ray", "serial")
    assert cluster_summary["weights_sha256"] in submit_result.stdout
    assert "0.5 CPU each" in submit_result.stdout  # five actors share the four CPUs of the cluster
    arguments = [
        "digits",
        "training.epochs=100000",
        "checkpoint.every_minibatches=50",
        "--runs",
        str(tmp_path / "stopped"),
    ]
    command = [sys.executable, "-m", "ray.scripts.scripts", "submit", str(file), "ffdist/run.py", "--", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # The shell may have set SIGINT to be ignored.
    restore_sigint = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=restore_sigint, **options) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("stopped/digits-*/checkpoints/*/manifest.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    print(f"$ ray submit ...  # and Ctrl-C\n{output}exit code {process.returncode}\n")
    assert process.returncode == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/stopped/mlflow.db")
    while client.search_runs(["1"])[0].info.status == "RUNNING" and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    assert client.search_runs(["1"])[0].info.status == "KILLED"
    failed_result = ray("submit", str(file), "ffdist/run.py", "--", "digits", "training.epochs=none")
    assert failed_result.returncode == 1
    assert "training.epochs" in failed_result.stdout + failed_result.stderr


@pytest.mark.slow
def test_a_job_over_two_nodes(ray_folder, tmp_path):
    """Uses `ray start` and `ray job submit`. Both nodes run stages, and the weights equal those of a local run."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, dashboard = (server.getsockname()[1] for server in servers)
    for server in servers:
        server.close()
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        deadline = time.monotonic() + 60
        while True:
            result = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
            )
            # The agent takes a while to start.
            if "No available agent" not in result.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    ray, layers = "ray.scripts.scripts", "model.layers=[60,50,40,30,20]"  # seven actors with a quarter of a CPU each
    options = ["digits", "training.epochs=2", layers, "--runs", tmp_path / "runs"]
    head_options = [
        "--head",
        f"--port={port}",
        f"--dashboard-agent-listen-port={port + 2}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    try:
        run(
            ray,
            "start",
            *head_options,
            f"--ray-client-server-port={port + 1}",
            "--num-cpus=1",
            f"--temp-dir={ray_folder}",
        )
        run(ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", f"--dashboard-agent-listen-port={port + 3}")
        address = f"--address=http://127.0.0.1:{dashboard}"
        summary_option = ["--summary", tmp_path / "far.json"]
        output = run(ray, "job", "submit", address, "--", sys.executable, "-m", "ffdist.run", *options, *summary_option)
        assert "succeeded" in output
        actors = json.loads(run(ray, "list", "actors", address, "--format=json", "--detail"))
        nodes = {actor["node_id"] for actor in actors if actor["class_name"].startswith("Stage")}
        assert len(nodes) == 2, actors
        run("ffdist.cli", "train", *options, "--runner", "serial", "--summary", tmp_path / "near.json")
    finally:
        kill_processes_of(home)
    cluster_summary, local_summary = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("far", "near"))
    assert cluster_summary["weights_sha256"] == local_summary["weights_sha256"]
