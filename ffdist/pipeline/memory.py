"""Upper bounds of the host memory that a run needs."""

from dataclasses import replace

from ffdist.ff.architecture import Architecture
from ffdist.ff.specs import FLOAT32_BYTES
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.schedule import EVALUATION_ROWS

PROCESS_BYTES = 350_000_000
"""Memory of an actor's process without data: torch and Ray (335 MB measured, torch 2.14 and Ray 2.60)."""

TERM_VALUES = 8
"""Upper bound of the float32 values per activation of a minibatch for a loss that is added to an objective."""


def driver_bytes(architecture: Architecture) -> int:
    """Returns the memory of the driver for a network.

    To resume, it holds the whole state, and the largest file twice. At the end, it holds the weights for inference, and
    once more for MLflow's model.
    """
    state = architecture.state_bytes
    # The precision may not be resolved yet, and bfloat16 needs a copy of the weights.
    copies = max(sum(each.copy_bytes) for each in (architecture, replace(architecture, precision="bfloat16")))
    readout = architecture.classes * architecture.num_features * architecture.has_readout
    weights = FLOAT32_BYTES * (sum(architecture.num_parameters) + readout)
    resuming = sum(state) + weights + copies  # largest if another run's weights are loaded
    ending = 3 * weights + 2 * copies
    return max(resuming, ending) + max(state)


def layer_bytes(architecture: Architecture) -> int:
    """Returns the memory of the largest layer while it is trained, without activations."""
    state, copies, weights = architecture.state_bytes, architecture.copy_bytes, architecture.num_parameters
    return max(
        state[layer] + 2 * copies[layer] + FLOAT32_BYTES * weights[layer] for layer in range(len(architecture.layers))
    )


def stage_bytes(blueprint: Blueprint, layers: range) -> int:
    """Returns the memory of a stage's tensors on its device."""
    architecture, order, negatives = blueprint.architecture, blueprint.order, blueprint.negatives
    state, copies = architecture.state_bytes, architecture.copy_bytes
    state_and_copies = sum(state[layer] + copies[layer] for layer in layers)
    # A gradient, or the random initial weights while a layer is built.
    gradient = max(FLOAT32_BYTES * architecture.num_parameters[layer] + copies[layer] for layer in layers)
    evaluated = min(EVALUATION_ROWS, architecture.max_rows)
    rows = max(order.batch_size * (1 + negatives.per_sample + architecture.has_neutral), evaluated)
    values = [
        (spec.working_values + TERM_VALUES * len(rule.terms)) * max(form.width, activations.width)
        for spec, form, activations, rule in zip(
            architecture.layers, architecture.forms, architecture.activation_forms, architecture.rules, strict=False
        )
    ]
    outputs = 2 * blueprint.chunk_size * blueprint.bytes_out(layers)  # each minibatch, and all of them stacked
    activations = rows * max(values[layers.start : layers.stop]) * FLOAT32_BYTES
    # In the first stage, each sample and its negative, before and after the augmentation.
    encoder, num_samples = architecture.encoder, 0 if layers.start else 4 * blueprint.chunk_size * order.batch_size
    source = num_samples * (encoder.sample_bytes + encoder.augmentation_bytes)
    readouts = readout_bytes(blueprint, layers) if architecture.readout_kind == "per_layer" else 0
    return state_and_copies + gradient + activations + outputs + source + readouts


def readout_bytes(blueprint: Blueprint, layers: range) -> int:
    """Returns the memory for training readouts of some layers, without their state."""
    architecture = blueprint.architecture
    forms = zip(architecture.read_layers, architecture.read_forms, strict=True)
    features = sum(form.size for index, (_, form) in forms if index in layers)
    return 3 * FLOAT32_BYTES * features * max(blueprint.order.batch_size, architecture.classes)


def machine_bytes(blueprint: Blueprint, *, stored: int | None) -> int:
    """Returns the memory of a run on this machine, in addition to what the driver already holds.

    Args:
        blueprint: Of the run.
        stored: Bytes in the object store; None for a serial run.
    """
    architecture = blueprint.architecture
    state = architecture.state_bytes
    stages = sum(stage_bytes(blueprint, layers) for layers in blueprint.stage_layers)
    readout = state[-1] + readout_bytes(blueprint, architecture.read_layers) * (architecture.readout_kind == "joint")
    writer = max(state)  # it serializes one file at a time
    resumed = sum(state)
    needed = max(stages + readout + writer + resumed + (stored or 0), driver_bytes(architecture))
    actors = (
        0
        if stored is None
        else len(blueprint.stage_layers) + blueprint.negatives.num_actors + 1 + architecture.has_readout
    )
    return needed + actors * PROCESS_BYTES
