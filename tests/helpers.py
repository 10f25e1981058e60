"""Small networks for tests."""

import shutil
from dataclasses import fields

from ffdist import load_config, train
from ffdist.ff.architecture import Architecture
from ffdist.ff.encoders import ImageEncoder
from ffdist.ff.layers import Minibatch, Output, Passes

ENCODER_SETTINGS = {field.name for field in fields(ImageEncoder)}


def image_architecture(shape, classes, layers, **settings) -> Architecture:
    """Returns an architecture for images; settings are those of `ImageEncoder` and `Architecture`."""
    encoder = {key: settings.pop(key) for key in list(settings) if key in ENCODER_SETTINGS}
    return Architecture(ImageEncoder(shape, classes, **encoder), layers, **settings)


def train_rows(layer, rows, batch, negatives=1, **options):
    """Trains a layer on rows `[R, D]`: positive, negative, and then other ones; returns the output for all of them."""
    layer.add_optimizer_state()
    num_passes = len(rows) // batch
    passes = Passes(negatives, has_neutral=num_passes > 1 + negatives)
    output, metrics = layer.train_minibatch(Minibatch(rows.view(num_passes, batch, -1), passes), **options)
    return Output(*(part.flatten(0, 1) for part in output)), metrics


def forget_end(run, num_checkpoints) -> None:
    """Makes a finished run look as if it had been stopped after its first checkpoints."""
    (run.folder / "summary.json").unlink()
    for checkpoint in sorted((run.folder / "checkpoints").iterdir())[num_checkpoints:]:
        shutil.rmtree(checkpoint)


def digests(name, settings, paces, runs) -> set[str]:
    """Trains a configuration at each pace: runner, number of stages and chunk size; returns the digests of the runs."""
    summaries = []
    for runner, stages, chunk in paces:
        config = load_config(name, [*settings, f"pipeline.stages={stages}", f"pipeline.chunk_size={chunk}"])
        summaries.append(train(config, runner=runner, address=None, runs=runs).summary)
    return {summary["weights_sha256"] for summary in summaries}
