from pathlib import Path

import pytest

from ffdist.config import ConfigError
from ffdist.runtime.cluster import check_object_store, cluster_resources, connect


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="torch could use what is here")
def test_gpus_that_torch_cannot_use_do_not_count(monkeypatch):
    """Ray counts GPUs by their driver, or as many as it is told; `auto` must not send stages there on its word."""
    import ray

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, logging_level="ERROR"):
        assert ray.cluster_resources()["GPU"] == 2
        assert cluster_resources()["GPU"] == 0


def test_other_platforms_are_sent_to_the_serial_runner(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match=r"needs Linux \(platform: darwin\); use --runner serial"), connect("local"):
        pass


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("host:many", "no Ray cluster answers"),
        ("ray://a:1", "use `ray submit`"),
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(address, words):
    with pytest.raises(ConfigError, match=words), connect(address):
        pass


def test_a_ray_that_is_there_is_used_and_left_alone(ray_start_4_cpus):
    import ray

    with connect("local"):
        assert cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


def test_a_store_too_small_says_what_fills_it(ray_start_4_cpus):
    check_object_store(images=1_000, in_flight=1_000)
    with pytest.raises(ConfigError, match=r"images: 1,000 bytes, chunks in flight: 10,000,000,000,000.*chunk_size"):
        check_object_store(images=1_000, in_flight=10**13)
