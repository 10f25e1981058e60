"""Builds the architecture of a network from a configuration, and validates it before a run starts."""

from collections.abc import Sequence

from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.ff.layers import Rule
from ffdist.ff.local import Fields
from ffdist.ff.network import Architecture
from ffdist.ff.optimizers import Update


def build_architecture(
    config: Config, shape: tuple[int, int, int], classes: int, untrained: Sequence[int] = ()
) -> Architecture:
    """Returns the architecture that a configuration describes.

    Args:
        config: The configuration.
        shape: Channels, height and width of the images.
        classes: Number of classes.
        untrained: Classes without training samples.

    Raises:
        ConfigError: The layers do not fit together, or the label cannot be embedded in their input.
    """
    model, training = config.model, config.training
    try:
        return Architecture(
            shape=shape,
            classes=classes,
            layers=tuple(
                layer if isinstance(layer, int) else Fields(layer.grid, layer.stride, layer.field, layer.units)
                for layer in model.layers
            ),
            label=config.data.label,
            label_scale=config.data.label_scale,
            subtract_mean=shape[0] > 1 if config.data.subtract_mean == "auto" else config.data.subtract_mean,
            predict_from=config.predict_from,
            seed=config.seed,
            rule=Rule(
                goodness=model.goodness,
                normalization=model.normalization,
                loss=training.loss,
                alpha=training.alpha,
                alternating=training.updates == "alternating",
                updates_per_minibatch=training.updates_per_minibatch,
                peer_strength=training.peer_normalization,
                update=Update(training.learning_rate, training.weight_decay, training.momentum, training.optimizer),
            ),
            thresholds=config.thresholds,
            readout_update=Update(training.readout_learning_rate, training.readout_weight_decay, training.momentum),
            precision="float32" if training.precision == "auto" else training.precision,  # `auto` is resolved later
            untrained=tuple(untrained),
        )
    except ValueError as error:
        raise ConfigError(f"model.layers and data.label must fit together: {error}") from error
