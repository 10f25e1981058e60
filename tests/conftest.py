import os
from pathlib import Path

import pytest

os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = Path(os.environ.get("FFDIST_DATA", Path.home() / ".cache/ffdist"))
    if not (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file():
        pytest.skip(f"MNIST is not in {root}; set FFDIST_DATA to a folder that has MNIST/raw")
    return root


@pytest.fixture(scope="module")
def ray_start_4_cpus(tmp_path_factory):
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()
