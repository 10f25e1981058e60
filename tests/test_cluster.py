from pathlib import Path

import pytest

from ffdist.errors import ConfigError
from ffdist.runtime.access import local_ray
from ffdist.runtime.cluster import check_object_store, cluster_resources, connect
from ffdist.runtime.placement import reserve


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="torch could use what is here")
def test_gpus_that_torch_cannot_use_do_not_count(monkeypatch):
    """Ray counts the GPUs that NVIDIA's driver or `num_gpus` reports, so `auto` must check them with torch."""
    import ray

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with local_ray(num_cpus=1, num_gpus=2):
        assert ray.cluster_resources()["GPU"] == 2
        with reserve([{"GPU": 0.9}] * 2):
            assert cluster_resources()["GPU"] == 0
        with reserve([{"GPU": 1}] * 2):
            assert cluster_resources()["GPU"] == 0, "known from before"
            assert cluster_resources("cpu")["GPU"] == 2, "not asked"


def test_other_platforms_are_referred_to_the_serial_runner(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match=r"needs Linux \(platform: darwin\); use --runner serial"), connect("local"):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("host:many", "no Ray cluster answers"),
        ("ray://a:1", "use `ray submit`"),
        ("http://127.0.0.1:8265", "is the address of Ray's dashboard and jobs.*use `ray job submit"),
    ],
)
def test_unusable_address_is_refused_immediately(address, message):
    with pytest.raises(ConfigError, match=message), connect(address):
        pass


def test_existing_ray_connection_is_reused_and_stays_open(ray_start_4_cpus):
    import ray

    with connect("local"):
        assert cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


def test_object_store_error_states_the_sizes_of_its_contents(ray_start_4_cpus):
    check_object_store(sample_bytes=1_000, in_flight_bytes=1_000)
    with pytest.raises(ConfigError, match=r"samples: 1,000 bytes, chunks in flight: 10,000,000,000,000.*chunk_size"):
        check_object_store(sample_bytes=1_000, in_flight_bytes=10**13)


def test_stopped_cluster_is_reported_as_the_cause(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": False, "Resources": {}}])
    with pytest.raises(ConfigError, match="the Ray cluster was stopped"):
        check_object_store(sample_bytes=1, in_flight_bytes=1)
    with pytest.raises(ConfigError, match="the Ray cluster was stopped"), reserve([{"CPU": 1}]):
        pass
