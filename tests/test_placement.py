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


def decided(layers=4, resources=None, negative_actors=1, **settings):
    return decide(
        Pipeline(**settings), layers=layers, negative_actors=negative_actors, resources=resources or {"CPU": 8}
    )


def test_auto_is_one_stage_a_layer_on_processors():
    placement = decided()
    assert (placement.num_stages, placement.device, placement.stage_gpus, placement.stage_cpus) == (4, "cpu", 0, 1)


def test_auto_is_one_stage_a_gpu_where_there_are_fewer_gpus_than_layers():
    placement = decided(resources={"CPU": 16, "GPU": 2})
    assert (placement.num_stages, placement.device, placement.stage_gpus) == (2, "cuda", 0.9)
    assert decided(resources={"CPU": 16, "GPU": 8}).num_stages == 4


@pytest.mark.parametrize(
    ("stages", "gpus", "share"), [(4, 4, 0.9), (4, 2, 0.45), (4, 3, 0.45), (5, 2, 0.3), (3, 8, 0.9)]
)
def test_stages_share_gpus_evenly_and_leave_room_for_the_readout(stages, gpus, share):
    placement = decided(layers=6, stages=stages, resources={"CPU": 16, "GPU": gpus})
    assert placement.stage_gpus == pytest.approx(share)
    assert placement.bundles(1)[stages] == {"GPU": READOUT_GPU_FRACTION}


def test_few_processors_are_shared_like_gpus():
    placement = decided(resources={"CPU": 2})
    assert placement.stage_cpus == placement.other_cpus == 0.3333
    assert decided(resources={"CPU": 64}, threads_per_stage=8).stage_cpus == 8


@pytest.mark.parametrize(("layers", "cpus"), [(10, 2), (4, 2), (15, 8), (28, 2)])
def test_shares_fit_however_ray_rounds_them(layers, cpus):
    placement = decided(layers=layers, resources={"CPU": cpus, "GPU": 1}, device="cpu")
    per_cpu = math.ceil((layers + 2) / cpus)
    assert round(placement.stage_cpus, 4) == placement.stage_cpus
    assert 1 - per_cpu / 10_000 < per_cpu * placement.stage_cpus <= 1
    share = decided(layers=layers, resources={"CPU": cpus, "GPU": 1}).stage_gpus
    assert round(share, 4) == share
    several = decided(layers=layers, stages=layers, resources={"CPU": cpus, "GPU": 1}).stage_gpus
    assert round(several, 4) == several
    assert layers * several + READOUT_GPU_FRACTION <= 1


def test_processors_are_used_where_that_was_asked_for():
    assert decided(resources={"CPU": 8, "GPU": 4}, device="cpu").device == "cpu"


def test_gpus_asked_for_and_not_there():
    with pytest.raises(ConfigError, match=r"pipeline\.device=cuda needs at least one GPU \(the cluster has 8 CPUs"):
        decided(device="cuda")


def test_gpus_that_an_autoscaler_is_to_add():
    placement = decided(device="cuda", stages=2, resources={"CPU": 4, "autoscaler": 1})
    assert (placement.device, placement.num_stages, placement.stage_gpus) == ("cuda", 2, 0.9)
    with pytest.raises(ConfigError, match=r"no GPU\); set pipeline\.stages to the number of GPUs that the autoscaler"):
        decided(device="cuda", resources={"CPU": 4, "autoscaler": 1})


def test_bundles_are_in_the_order_in_which_actors_are_made():
    bundles = decided(stages=2, layers=2, negative_actors=2, resources={"CPU": 8, "GPU": 1}).bundles(2)
    assert bundles == [{"CPU": 1, "GPU": 0.45}] * 2 + [{"GPU": 0.1}] + [{"CPU": 1}] * 2


def test_an_actor_that_no_node_can_hold_is_refused_at_once(ray_start_4_cpus):
    needed = r"needed: 1 CPU, 1 GPU; nodes have: 4 CPU, 0 GPU\); set pipeline\.threads_per_stage lower"
    with pytest.raises(ConfigError, match=needed), reserve([{"CPU": 1, "GPU": 1}]):
        pass


def wait_until_free(cpus: int) -> None:
    """Ray tells a moment later what was taken or given back."""
    import ray

    while ray.available_resources().get("CPU", 0) != cpus:
        time.sleep(0.1)


def test_too_few_resources_say_what_the_cluster_has(ray_start_4_cpus, monkeypatch):
    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
    wait_until_free(4)
    needed = r"needed: 2 x \(3 CPU, 0 GPU\) \+ 1 x \(1 CPU, 0 GPU\); the cluster has: 4 CPU, 0 GPU; free: "
    with pytest.raises(ConfigError, match=needed), reserve([{"CPU": 3}] * 2 + [{"CPU": 1}]):
        pass


def test_a_cluster_in_use_says_what_is_free(ray_start_4_cpus, monkeypatch):
    wait_until_free(4)
    with reserve([{"CPU": 3}]), monkeypatch.context() as patch:
        wait_until_free(1)
        patch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
        patch.setattr("ffdist.runtime.placement.RELEASE_TIMEOUT_S", 2.0)
        with pytest.raises(ConfigError, match="has: 4 CPU, 0 GPU; free: 1 CPU"), reserve([{"CPU": 2}]):
            pass
    with reserve([{"CPU": 2}]):  # both are given back
        pass


def test_resources_of_a_run_that_was_killed_are_waited_for(ray_start_4_cpus, monkeypatch):
    """Ray releases them a while after its end, and the run may have been resumed at once."""
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 0.5)
    wait_until_free(4)
    of_killed_run = placement_group([{"CPU": 3}])
    wait_until_free(1)
    release = threading.Timer(2.0, remove_placement_group, [of_killed_run])
    release.start()
    with reserve([{"CPU": 4}]):
        assert not release.is_alive()


def test_a_cluster_that_changes_meanwhile_is_looked_at_again(ray_start_4_cpus, monkeypatch):
    """A node that was just lost still counts for a while."""
    monkeypatch.setattr("ffdist.runtime.placement.PLACEMENT_TIMEOUT_S", 1.0)
    wait_until_free(4)
    config, seen = load_config("digits", ["training.precision=float32"]), [{"CPU": 64.0}, {"CPU": 4.0}]
    with allocate("ray", prepare(config), config, lambda device: seen.pop(0)) as place:
        assert (place.placement.stage_cpus, place.resources, seen) == (0.5, {"CPU": 4.0}, [])
