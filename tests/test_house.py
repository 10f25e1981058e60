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


def test_no_module_is_named_like_a_standard_library_module():
    """If run.py runs as a script, `sys.path[0]` is the folder of the package, and Ray's workers inherit it."""
    names = {path.stem for path in PACKAGE.iterdir()} - {"__init__"}
    assert not names & (sys.stdlib_module_names | {"evaluate", "datasets", "ray", "mlflow", "torch"})
    assert not {path.stem for path in MODULES} & (sys.stdlib_module_names | {"utils", "common", "helpers"})


def packages_loaded_by(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_of_the_package_loads_no_large_dependency():
    assert not packages_loaded_by("import ffdist, ffdist.cli") & {
        "ray",
        "mlflow",
        "torch",
        "torchvision",
        "matplotlib",
        "pyarrow",
    }


def test_algorithm_and_pipeline_import_only_torch():
    modules = [path.relative_to(PACKAGE.parent) for path in MODULES if path.parent.name in {"ff", "pipeline"}]
    names = ", ".join(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules)
    installed = {name for requirement in requires("ffdist") for name in re.findall(r"^[\w.-]+", requirement)}
    packages = {"PIL", "yaml", "sklearn"} | {name.lower().replace("-", "_") for name in installed}
    assert not packages_loaded_by(f"import {names}") & (packages - {"torch", "numpy"})


@pytest.mark.parametrize("name", ffdist.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(ffdist, name).__doc__


def test_unknown_public_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ffdist.nonsense  # noqa: B018


def test_every_setting_is_used():
    from ffdist.config.schema import Config

    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    names_read = {
        (getattr(node.value, "attr", None) or getattr(node.value, "id", None), node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute)
    }
    names_read |= {
        tuple(str(node.value).split(".")) for node in nodes if isinstance(node, ast.Constant)
    }  # MLflow's parameters
    names_read |= {("data", field.name) for field in fields(ImageEncoder)}  # `build_encoder` reads them by name
    owners = {
        "data": {"config", "data", "self"},
        "model": {"model", "self"},
        "pipeline": {"pipeline", "limits"},
        "tracking": {"tracking", "_config", "config"},
        "": {"config"},
    }
    for key, _ in Config.settings():
        section, setting = ("", *key.split("."))[-2:]
        names = {section, *owners.get(section, ())}
        assert names_read & {(name, setting) for name in names}, f"nothing reads {key}"
