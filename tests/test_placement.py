import math
import threading
import time

import pytest

from ffdist.config.loading import load_config
from ffdist.config.sections import Pipeline
from ffdist.errors import ConfigError
from ffdist.runtime.placement import READOUT_GPU_FRACTION, decide, reserve
from ffdist.training.launch import allocate
from ffdist.training.prepare import prepare


def make_placement(layers=4, resources=None, negative_actors=1, **settings):
    return decide(
        Pipeline(**settings), layers=layers, negative_actors=negative_actors, resources=resources or {"CPU": 8}
    )


def test_auto_uses_one_stage_per_layer_on_cpu():
    placement = make_placement()
    assert (placement.num_stages, placement.device, placement.stage_gpus, placement.stage_cpus) == (4, "cpu", 0, 1)


def test_auto_uses_one_stage_per_gpu_if_there_are_fewer_gpus_than_layers():
    placement = make_placement(resources={"CPU": 16, "GPU": 2})
    assert (placement.num_stages, placement.device, placement.stage_gpus) == (2, "cuda", 0.9)
    assert make_placement(resources={"CPU": 16, "GPU": 8}).num_stages == 4


@pytest.mark.parametrize(
    ("stages", "gpus", "gpus_per_stage"), [(4, 4, 0.9), (4, 2, 0.45), (4, 3, 0.45), (5, 2, 0.3), (3, 8, 0.9)]
)
def test_stages_share_gpus_evenly_and_leave_room_for_the_readout(stages, gpus, gpus_per_stage):
    placement = make_placement(layers=6, stages=stages, resources={"CPU": 16, "GPU": gpus})
    assert placement.stage_gpus == pytest.approx(gpus_per_stage)
    assert placement.bundles(1)[stages] == {"GPU": READOUT_GPU_FRACTION}


def test_actors_share_cpus_evenly_if_there_are_too_few():
    placement = make_placement(resources={"CPU": 2})
    assert placement.stage_cpus == placement.other_cpus == 0.3333
    assert make_placement(resources={"CPU": 64}, threads_per_stage=8).stage_cpus == 8


@pytest.mark.parametrize(("layers", "cpus"), [(10, 2), (4, 2), (15, 8), (28, 2)])
def test_resource_fractions_fit_after_ray_rounds_them(layers, cpus):
    placement = make_placement(layers=layers, resources={"CPU": cpus, "GPU": 1}, device="cpu")
    actors_per_cpu = math.ceil((layers + 2) / cpus)
    assert round(placement.stage_cpus, 4) == placement.stage_cpus
    assert 1 - actors_per_cpu / 10_000 < actors_per_cpu * placement.stage_cpus <= 1
    gpu_fraction = make_placement(layers=layers, resources={"CPU": cpus, "GPU": 1}).stage_gpus
    assert round(gpu_fraction, 4) == gpu_fraction
    shared_gpu_fraction = make_placement(layers=layers, stages=layers, resources={"CPU": cpus, "GPU": 1}).stage_gpus
    assert round(shared_gpu_fraction, 4) == shared_gpu_fraction
    assert layers * shared_gpu_fraction + READOUT_GPU_FRACTION <= 1


def test_device_cpu_does_not_use_gpus():
    assert make_placement(resources={"CPU": 8, "GPU": 4}, device="cpu").device == "cpu"


def test_device_cuda_without_gpus_is_refused():
    with pytest.raises(ConfigError, match=r"pipeline\.device=cuda needs at least one GPU \(the cluster has 8 CPUs"):
        make_placement(device="cuda")


def test_autoscaler_can_add_gpus_only_if_the_number_of_stages_is_set():
    placement = make_placement(device="cuda", stages=2, resources={"CPU": 4, "autoscaler": 1})
    assert (placement.device, placement.num_stages, placement.stage_gpus) == ("cuda", 2, 0.9)
    with pytest.raises(ConfigError, match=r"no GPU\); set pipeline\.stages to the number of GPUs that the autoscaler"):
        make_placement(device="cuda", resources={"CPU": 4, "autoscaler": 1})


def test_bundles_are_in_the_order_of_actor_creation():
    bundles = make_placement(stages=2, layers=2, negative_actors=2, resources={"CPU": 8, "GPU": 1}).bundles(2)
    assert bundles == [{"CPU": 1, "GPU": 0.45}] * 2 + [{"GPU": 0.1}] + [{"CPU": 1}] * 2


def test_actor_that_fits_on_no_node_is_refused_immediately(ray_start_4_cpus):
    message = r"needed: 1 CPU, 1 GPU; nodes have: 4 CPU, 0 GPU\); set pipeline\.threads_per_stage lower"
    with pytest.raises(ConfigError, match=message), reserve([{"CPU": 1, "GPU": 1}]):
        pass


def wait_until_free(cpus: int) -> None:
    """Waits until Ray reports this number of free CPUs. Its report lags behind reservations."""
    import ray

    while ray.available_resources().get("CPU", 0) != cpus:
        time.sleep(0.1)


def test_placement_error_states_the_resources_of_the_cluster(ray_start_4_cpus, monkeypatch):
    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
    wait_until_free(4)
    message = r"needed: 2 x \(3 CPU, 0 GPU\) \+ 1 x \(1 CPU, 0 GPU\); the cluster has: 4 CPU, 0 GPU; free: "
    with pytest.raises(ConfigError, match=message), reserve([{"CPU": 3}] * 2 + [{"CPU": 1}]):
        pass


def test_placement_error_states_the_free_resources(ray_start_4_cpus, monkeypatch):
    wait_until_free(4)
    with reserve([{"CPU": 3}]), monkeypatch.context() as patch:
        wait_until_free(1)
        patch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
        patch.setattr("ffdist.runtime.placement.RELEASE_TIMEOUT_S", 2.0)
        with pytest.raises(ConfigError, match="has: 4 CPU, 0 GPU; free: 1 CPU"), reserve([{"CPU": 2}]):
            pass
    with reserve([{"CPU": 2}]):  # both reservations were released
        pass


def test_reserve_waits_for_resources_of_a_killed_run(ray_start_4_cpus, monkeypatch):
    """Ray releases them some time after the run has ended, but the run may be resumed before that."""
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 0.5)
    wait_until_free(4)
    group = placement_group([{"CPU": 3}])
    wait_until_free(1)
    release = threading.Timer(2.0, remove_placement_group, [group])
    release.start()
    with reserve([{"CPU": 4}]):
        assert not release.is_alive()


def test_allocation_is_repeated_if_the_cluster_changed(ray_start_4_cpus, monkeypatch):
    """Ray counts a lost node for some time."""
    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
    wait_until_free(4)
    config, totals = load_config("digits", ["training.precision=float32"]), [{"CPU": 64.0}, {"CPU": 4.0}]
    with allocate("ray", prepare(config), config, lambda device: totals.pop(0)) as allocation:
        assert (allocation.placement.stage_cpus, allocation.resources, totals) == (0.5, {"CPU": 4.0}, [])
