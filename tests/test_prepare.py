"""Invalid settings raise errors before anything starts."""

import pytest
import torch

from ffdist.config.architecture import build_encoder
from ffdist.config.loading import load_config, parse_config
from ffdist.errors import ConfigError
from ffdist.training.prepare import prepare

LOCAL = "{kind: local, grid: 3, stride: 2, field: 4, units: 5}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.label=none"], "negatives.kind=wrong_label: shows wrong labels, but data.label=none shows no labels"),
        (["negatives.kind=hybird"], r"negatives.kind=hybird: is none of wrong_label, .*, nor package\.module:function"),
        (["negatives.kind=nowhere:at_all"], "negatives.kind=nowhere:at_all: cannot be imported"),
        (["negatives.kind=math:sqrt"], "negatives.kind=math:sqrt: raised TypeError"),
        (["negatives.options={blurs: 2}"], r"takes no option blurs \(its options: none\)"),
        (["negatives.kind=hybrid", "negatives.options={blurs: many}"], "blurs must be an integer"),
        (["data.label=everywhere"], "the first layer has none"),
        (
            [f"model.layers=[{LOCAL}, 20]"],
            "label=append shows the label to few of the local fields; set it to everywhere",
        ),
        ([f"model.layers=[20, {LOCAL}]"], "layer 2 has local fields and needs a map as input"),
        (
            ["negatives.kind=hard_label", "negatives.prediction_delay=20", "pipeline.chunk_size=28"],
            "chunk_size: 28, negatives.prediction_delay: 20",
        ),
        (["model.layers=[10000000,10000000]"], r"needed: 2,400,\d{3}\.\d GB, available: \d"),
        (
            [
                *("training.batch_size=1", "data.label=everywhere"),
                "model.layers=[{kind: conv, channels: 4, kernel: 8, padding: 0}]",
            ],
            "layer 1 has a batch norm, which needs at least two values of a channel",
        ),
        (["training.batch_size=5000"], "batch_size: 5000, training samples: 1437"),
    ],
)
def test_incompatible_settings_raise_config_error(overrides, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("digits", overrides))


def test_store_of_another_seed_dataset_or_kind_is_rejected(tmp_path):
    store = [f"negatives.store={tmp_path}/store"]
    prepare(load_config("digits", [*store, "seed=5"]))  # does not create the store, so that another seed can use it
    prepare(load_config("digits", store)).negatives.store.write(0, 0, torch.zeros(5).long())
    prepare(load_config("digits", [*store, "training.epochs=3", "data.label=overwrite", "pipeline.chunk_size=3"]))
    with pytest.raises(ConfigError, match="seed: store 0, run 1"):
        prepare(load_config("digits", [*store, "seed=1"]))
    with pytest.raises(ConfigError, match="dataset_sha256: store"):
        prepare(load_config("digits", [*store, "training.validation_samples=9"]))
    with pytest.raises(ConfigError, match="kind: store 'wrong_label', run 'fixed'"):
        prepare(load_config("digits", [*store, "negatives.kind=fixed"]))


def test_store_accepts_options_that_equal_the_defaults(tmp_path):
    hybrid = ["data.label=none", "negatives.kind=hybrid", f"negatives.store={tmp_path}/store"]
    prepare(load_config("digits", hybrid)).negatives.store.write(0, 0, torch.zeros(5).long())
    prepare(load_config("digits", [*hybrid, "negatives.options={blurs: 6}"]))
    with pytest.raises(ConfigError, match=r"options: store .*blurs.*6.*run .*blurs.*5"):
        prepare(load_config("digits", [*hybrid, "negatives.options={blurs: 5}"]))


def test_manifest_of_a_store_contains_neither_tracking_uri_nor_path(tmp_path):
    secret = ["tracking.uri=http://SECRET", f"negatives.store={tmp_path}/SECRET"]
    prepare(load_config("digits", secret)).negatives.store.write(0, 0, torch.zeros(5).long())
    assert "SECRET" not in (tmp_path / "SECRET/manifest.json").read_text()


def test_subtract_mean_is_the_default_for_colour_images_only():
    data = {"name": "digits"}
    for shape, setting, expected in (
        ((1, 4, 4), "auto", False),
        ((3, 4, 4), "auto", True),
        ((1, 4, 4), True, True),
        ((3, 4, 4), False, False),
    ):
        config = parse_config({"data": data | {"subtract_mean": setting}, "model": {"layers": [5]}}, "test")
        assert build_encoder(config.data, "image", shape, 3).subtract_mean is expected


def test_chunk_size_may_exceed_the_epoch():
    prepare(load_config("digits", ["negatives.kind=hard_label", "pipeline.chunk_size=1000"]))


def test_only_hard_labels_have_a_prediction_delay():
    delays = [
        prepare(load_config("digits", [f"negatives.kind={kind}"])).negatives.prediction_delay
        for kind in ("wrong_label", "hard_label")
    ]
    assert delays == [None, 56]
