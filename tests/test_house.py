"""Rules for the whole package: names of modules, what an import loads, public names, settings. See also .ci/run."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import requires
from pathlib import Path

import pytest

import ffdist
from ffdist.ff.encoders import ImageEncoder

PACKAGE = Path(ffdist.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_no_module_is_named_like_one_of_the_standard_library():
    """`sys.path[0]` is the package's own folder where run.py runs as a script, and Ray's workers inherit it."""
    names = {path.stem for path in PACKAGE.iterdir()} - {"__init__"}
    assert not names & (sys.stdlib_module_names | {"evaluate", "datasets", "ray", "mlflow", "torch"})
    assert not {path.stem for path in MODULES} & (sys.stdlib_module_names | {"utils", "common", "helpers"})


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_the_package_stays_light():
    assert not loaded_by("import ffdist, ffdist.cli") & {
        "ray",
        "mlflow",
        "torch",
        "torchvision",
        "matplotlib",
        "pyarrow",
    }


def test_algorithm_and_pipeline_need_torch_alone():
    modules = [path.relative_to(PACKAGE.parent) for path in MODULES if path.parent.name in {"ff", "pipeline"}]
    names = ", ".join(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules)
    installed = {name for requirement in requires("ffdist") for name in re.findall(r"^[\w.-]+", requirement)}
    packages = {"PIL", "yaml", "sklearn"} | {name.lower().replace("-", "_") for name in installed}
    assert not loaded_by(f"import {names}") & (packages - {"torch", "numpy"})


@pytest.mark.parametrize("name", ffdist.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(ffdist, name).__doc__


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ffdist.nonsense  # noqa: B018


def test_every_setting_is_used():
    from ffdist.config.schema import Config

    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    read = {
        (getattr(node.value, "attr", None) or getattr(node.value, "id", None), node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute)
    }
    read |= {
        tuple(str(node.value).split(".")) for node in nodes if isinstance(node, ast.Constant)
    }  # MLflow's parameters
    read |= {("data", field.name) for field in fields(ImageEncoder)}  # `build_encoder` sets them by their names
    readers = {
        "data": {"config", "data", "self"},
        "model": {"model", "self"},
        "pipeline": {"pipeline", "limits"},
        "tracking": {"tracking", "_config", "config"},
    }
    for section, field in Config.model_fields.items():
        for setting in getattr(field.annotation, "model_fields", {}):
            names = {section, *readers.get(section, ())}
            assert read & {(name, setting) for name in names}, f"nothing reads {section}.{setting}"
