import os
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ffdist.config.loading import RENAMED_SETTINGS, load_config, parse_config
from ffdist.config.reference import settings_reference
from ffdist.config.schema import CLASS_OBJECTIVES, Config
from ffdist.config.sections import Data, Model, Training
from ffdist.errors import ConfigError
from ffdist.ff.goodness import GOODNESS, MINUS, NORMALIZATIONS
from ffdist.ff.labels import LABELS
from ffdist.ff.losses import LOSSES
from ffdist.ff.objectives import OBJECTIVES
from ffdist.ff.optimizers import OPTIMIZERS
from ffdist.ff.schedules import SCHEDULES
from ffdist.ff.specs import Dense

CONFIGS = Path(__file__).parent.parent / "configs"
README = (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_found_by_name(path):
    assert load_config(path.stem) == load_config(str(path))


def test_readme_links_every_shipped_configuration():
    for path in CONFIGS.rglob("*.yaml"):
        assert f"[`{path.stem}`]({path.relative_to(CONFIGS)})" in README


def test_settings_reference_matches_the_schema():
    """To update the reference, replace it by the output of `python -m ffdist.config.reference`."""
    marker = "<!-- The rest of this file is the output of `python -m ffdist.config.reference`. -->\n\n"
    assert README.partition(marker)[2] == settings_reference() + "\n"


def test_configuration_with_common_settings_is_valid():
    config = parse_config(
        yaml.safe_load(
            """
            seed: 0
            data: {name: mnist, label: overwrite}
            model: {layers: [1000, 1000, 1000]}
            negatives: {kind: wrong_label, actors: 1}
            training: {epochs: 60, batch_size: 100, precision: bfloat16, validation_samples: 0}
            pipeline: {stages: auto, chunk_size: 20, max_in_flight: 4, threads_per_stage: 1}
            checkpoint: {}
            tracking: {}
            """
        ),
        "a test",
    )
    assert config.predict_from == 2


def test_overrides_take_precedence_and_the_last_one_wins():
    config = load_config("digits", ["training.epochs=3", "pipeline.stages=2", "training.epochs=4", "seed=7"])
    assert (config.training.epochs, config.pipeline.stages, config.seed) == (4, 2, 7)
    assert load_config("digits", ["training.learning_rate=1e-3"]).training.learning_rate == 0.001


def test_floats_follow_yaml_1_2():
    config = load_config(
        "digits", ["negatives.options={a: 5e-1, b: 1e5, c: +2E3, d: 1.5e3, g: .5e1, e: e5, f: '5e-1'}"]
    )
    assert config.negatives.options == {"a": 0.5, "b": 1e5, "c": 2e3, "d": 1500.0, "g": 5.0, "e": "e5", "f": "5e-1"}


def test_error_names_the_file_or_the_overrides_as_its_origin(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("data: {name: digits}\nmodel: {layers: [9]}\n")
    with pytest.raises(ConfigError, match=r"^overrides: unknown key epochs"):
        load_config(str(path), ["epochs=3", "seed=1"])
    path.write_text("data: {name: digits}\nmodel: {layers: [9]}\nepochs: 3\n")
    for overrides in ([], ["seed=1"]):
        with pytest.raises(ConfigError, match=rf"^{path}: unknown key epochs"):
            load_config(str(path), overrides)
    path.write_text("data: {name: digits}\n")
    assert load_config(str(path), ["model.layers=[9]"]).model.layers == [Dense(9)]


def test_resolved_configuration_survives_a_yaml_round_trip():
    config = load_config("mnist", ["data.root=/somewhere", "tracking.experiment='5e-1'"])
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_local_and_dense_layers_can_be_combined():
    layers = load_config(
        "digits", ["model.layers=[{kind: local, grid: 3, stride: 2, field: 4, units: 9}, 30]"]
    ).model.layers
    assert (layers[0].grid, layers[0].stride, layers[1]) == (3, 2, Dense(30))


def test_single_layer_is_used_for_prediction():
    assert load_config("digits", ["model.layers=[30]"]).predict_from == 1
    assert load_config("digits", ["model.layers=[30,20]", "model.predict_to=1"]).predict_from == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainig.epochs=3"], "unknown key trainig; did you mean training"),
        (["training.epoch=3"], "unknown key training.epoch; did you mean training.epochs"),
        (["training.epochs=0"], r"training.epochs \(0\): .*greater than or equal to 1"),
        (["training.epochs=many"], r"training.epochs \('many'\): .*integer"),
        (["training.learning_rate=.inf"], r"training.learning_rate \(inf\): .*less than or equal"),
        (
            ["tracking.flush_timeout_s=1e300"],
            r"tracking.flush_timeout_s .*less than or equal to 1000000000",
        ),
        (["tracking.register=a/b:c"], r"tracking.register \('a/b:c'\): .*match"),
        (["tracking.experiment=''"], r"tracking.experiment"),
        (["tracking.name=a/b"], r"tracking.name \('a/b'\): .*match"),
        (["tracking.tags={folder: x}"], "tracking.tags must not set what ffdist or MLflow sets .given: folder"),
        (["tracking.tags={mlflow.user: x}"], "given: mlflow.user"),
        (["tracking.also=[wandb]"], "tracking.also"),
        (["pipeline.stages=some"], r"pipeline.stages \('some'\): .*integer.*or .*'auto'"),
        (["model.layers=[]"], r"model.layers \(\[\]\): .*at least 1"),
        (["model.predict_from=4"], r"must be layers, 1 to 3, in this order \(predict_from: 4, predict_to: None\)"),
        (["model.predict_to=4"], r"must be layers, 1 to 3, in this order \(predict_from: None, predict_to: 4\)"),
        (["model.predict_from=3", "model.predict_to=2"], r"in this order \(predict_from: 3, predict_to: 2\)"),
        (["training.epochs=yes"], "training.epochs: a number is needed here, not True"),
        (["checkpoint.uri='http://[x'"], "checkpoint.uri: Invalid IPv6 URL"),
        (["seed=2024-13-45"], "the value of seed must be YAML"),
        (["data.image_size=[8, 8]"], r"data\.image_size is for custom datasets \(data\.name: digits\)"),
        (["data.classes=5"], r"data\.classes is for custom datasets"),
        (["data.name=cats"], r"data.name \('cats'\): .*'digits', 'mnist'"),
        (["data.path=/x"], "data.name=digits takes no data.path"),
        (["data.name=parquet"], "data.name=parquet needs data.path"),
        (["pipeline.balance=[1, 1]"], r"given: \[1, 1\], 2 layers in 2 stages; pipeline.stages: auto"),
        (["pipeline.balance=[1, 2]", "pipeline.stages=3"], r"in 2 stages; pipeline.stages: 3\); correct it"),
        (["pipeline.stages=4"], r"stages: 4, layers: 3\); set pipeline\.stages between 1 and 3, or to auto"),
        (
            ["model.layers=[{kind: local, grid: 2, feild: 3, units: 4}]"],
            "a local layer has no setting feild .its settings: grid, field",
        ),
        (
            ["model.layers=[{kind: local, grid: 2, field: 0, units: 4}]"],
            "model.layers.0: field must be a whole number from 1 to",
        ),
        (["model.layers=[{grid: 2, field: 3, units: 4}]"], r"model\.layers\.0.*kind must be one of dense, local"),
        (["negatives.kind=hard_label", "negatives.store=/tmp/x"], "depends on the training and cannot be stored"),
        (["data.label_scale=0"], r"data.label_scale \(0\): .*greater than 0"),
        (["training.stop.patience=0"], r"training\.stop\.patience \(0\): .*greater than or equal to 1"),
        (["training.stop.target=1"], r"training\.stop\.target \(1\): .*less than 1"),
        (["training.stop.metric=loss"], r"training\.stop\.metric \('loss'\): .*'balanced_error'"),
        (["training.stop.patients=3"], r"unknown key training\.stop\.patients; did you mean training.stop.patience\?"),
        (["training.stop=5"], r"training\.stop \(5\): "),
        (
            ["training.stop.patience=5", "training.schedule=greedy"],
            r"before all layers are trained \(patience: 5, target: None\); set both to null",
        ),
        (["training.validation_samples=some"], r"training\.validation_samples \('some'\): .*or .*'auto'"),
        (["training.epochs"], "an override must be section.key=value"),
        (["data.name.key=1"], "name is a value, not a section"),
        (["training.epochs=[1"], "the value of training.epochs must be YAML"),
    ],
)
def test_errors_of_invalid_settings_state_rule_value_and_fix(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", overrides)


@pytest.mark.parametrize(("old", "new"), RENAMED_SETTINGS.items())
def test_old_name_of_a_setting_is_rejected_with_the_new_name(old, new):
    section, name = new.split(".")
    assert name in Config.model_fields[section].annotation.model_fields
    with pytest.raises(ConfigError, match=rf"unknown key {old}; it was renamed to {new}"):
        load_config("digits", [f"{old}=1"])


def test_old_name_of_a_value_is_rejected_with_the_new_name():
    with pytest.raises(ConfigError, match=r"training\.optimizer \('release'\): .*release was renamed to hinton"):
        load_config("digits", ["training.optimizer=release"])


def test_error_of_an_unknown_configuration_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"given: digit; shipped: breast_cancer, .*digits.*did you mean digits"):
        load_config("digit")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "data: [",
        "{{",
        "seed: 2024-13-45",
        "!!python/object/apply:os.getcwd []",
        "\x00",
        "[" * 3000,
        "seed: {{ n }}",
    ],
)
def test_invalid_configuration_files_are_rejected(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(tmp_path / "bad.yaml"))


def test_duplicate_key_is_rejected(tmp_path):
    (tmp_path / "twice.yaml").write_text("data: {name: digits}\ntraining: {epochs: 1}\ntraining: {batch_size: 50}\n")
    with pytest.raises(ConfigError, match=r"duplicate key training.*line 3"):
        load_config(str(tmp_path / "twice.yaml"))


def test_yaml_merge_keys_are_not_duplicates(tmp_path):
    (tmp_path / "merged.yaml").write_text(
        "data: {name: digits}\nmodel: {layers: [9]}\ntraining: {epochs: 1, batch_size: 7}\n"
        "checkpoint: {keep_last: 3}\npipeline: {<<: {stages: 1}, <<: {chunk_size: 5}}\n"
    )
    assert load_config(str(tmp_path / "merged.yaml")).pipeline.chunk_size == 5


def test_empty_section_has_defaults(tmp_path):
    (tmp_path / "short.yaml").write_text("data: {name: digits}\nmodel: {layers: [9]}\ntraining:\npipeline:\n")
    assert load_config(str(tmp_path / "short.yaml"), ["training.epochs=3"]).training.epochs == 3
    assert load_config(str(tmp_path / "short.yaml")).training.epochs == 60


def test_home_folder_is_expanded_if_the_user_exists():
    assert load_config("mnist", ["data.root=~/images"]).data.root == Path.home() / "images"
    assert load_config("mnist", ["data.root=~nobody-here/images"]).data.root == Path("~nobody-here/images").absolute()


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        (Data, "label", {*LABELS, "none", "auto"}),
        (Model, "goodness", {sign + goodness for goodness in GOODNESS for sign in ("", MINUS)}),
        (Model, "normalization", NORMALIZATIONS),
        (Training, "loss", LOSSES),
        (Training, "optimizer", OPTIMIZERS),
        (Training, "learning_rate_schedule", SCHEDULES),
    ],
)
def test_choices_match_the_implemented_ones(section, key, expected):
    assert set(get_args(section.model_fields[key].annotation)) == set(expected)


def test_threshold_is_set_for_all_layers_or_for_each():
    layers = "model.layers=[30, 20]"
    assert load_config("digits", [layers]).thresholds == (None, None)
    assert load_config("digits", [layers, "model.threshold=2"]).thresholds == (2, 2)
    assert load_config("digits", [layers, "model.threshold=[units, 1.5]"]).thresholds == (None, 1.5)
    with pytest.raises(ConfigError, match=r"one for each of the 2 layers \(given: 3\)"):
        load_config("digits", [layers, "model.threshold=[1, 2, 3]"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.goodness=mean_of_squares"], "threshold=units is for sums of squares; set it to a number"),
        (["model.goodness=minus_softmax", "model.threshold=[8, units, 8]"], "threshold=units is for sums of squares"),
        (["training.loss=symmetric", "model.threshold=7"], "has no threshold .model.threshold: 7"),
    ],
)
def test_meaningless_thresholds_are_rejected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", overrides)


def test_backpropagation_reference_drops_layerwise_training_settings():
    overrides = [
        "training.schedule=greedy",
        "training.optimizer=adamw",
        "training.learning_rate=9",
        "training.epochs=7",
    ]
    config = load_config("digits", [*overrides, "negatives.kind=hard_label"]).by_backpropagation()
    assert config.num_epochs == 7
    assert config.training.learning_rate == config.training.readout_learning_rate
    assert config == load_config("digits", ["training.epochs=7"]).by_backpropagation()


def test_settings_of_a_nested_section_have_flat_keys():
    config = load_config("digits", ["training.stop.patience=5", "negatives.options={a: {b: 1}}"])
    flat = config.flat()
    assert (flat["training.stop.patience"], flat["training.stop.metric"], flat["seed"]) == (5, "error", 0)
    assert flat["negatives.options"] == {"a": {"b": 1}}
    assert "training.stop" not in flat
    assert parse_config(yaml.safe_load(config.to_yaml()), "a test") == config
    assert config.by_backpropagation().training.stop.patience == 5


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_train_on_all_samples(path):
    assert load_config(str(path)).training.validation_samples == 0


def test_greedy_schedule_trains_each_layer_for_all_epochs():
    assert load_config("digits", ["training.epochs=4"]).num_epochs == 4
    assert load_config("digits", ["training.epochs=4", "training.schedule=greedy"]).num_epochs == 12


def test_every_setting_is_documented():
    for key, field in Config.settings():
        assert field.description, key


def test_error_names_the_missing_section(tmp_path):
    (tmp_path / "bad.yaml").write_text("data: {name: digits}")
    with pytest.raises(ConfigError, match="model is missing"):
        load_config(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=https://me:hush@server",
        "tracking.uri=https://hush@server",
        "checkpoint.uri=s3://id:hush@bucket/checkpoints",
        "negatives.store=gs://bucket/store?access_token=hush",
    ],
)
def test_password_in_a_uri_is_rejected_and_not_printed(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}: a URI must hold no password or key") as error:
        load_config("digits", [override])
    assert "hush" not in str(error.value)


def test_paths_are_recorded_as_absolute_paths(tmp_path, monkeypatch):
    """A run folder may be read from another working directory."""
    monkeypatch.chdir(tmp_path)
    overrides = ["data.name=parquet", "data.path=birds", "checkpoint.uri=kept", "negatives.store=~/store"]
    config = load_config("digits", overrides)
    assert config.data.path == tmp_path / "birds"
    assert config.checkpoint.uri == f"{tmp_path}/kept"
    assert config.negatives.store == os.path.expanduser("~/store")  # noqa: PTH111
    assert load_config("digits", ["checkpoint.uri=s3://bucket/kept"]).checkpoint.uri == "s3://bucket/kept"


def test_configurations_know_which_objectives_need_no_negatives():
    assert {name for name, each in OBJECTIVES.items() if not each.needs_negatives} == set(CLASS_OBJECTIVES)
