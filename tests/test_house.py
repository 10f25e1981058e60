"""The rules of the house: who may import whom, what stays light, and that everything public exists."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ffdist

PACKAGE = Path(ffdist.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Arrows point down: a room may import from its own row and the rows below it.
ROWS = [
    {"cli", "run"},
    {"offline", "reproduce", "using", "chaos", "bench"},
    {"trainer"},
    {"recovery"},
    {"loop", "finished"},
    {"launch", "precision", "start", "pictures"},
    {"prepare"},
    {"runtime", "tracking", "host_memory"},
    {"pipeline", "checkpoint", "evaluation"},
    {"exported"},
    {"ff", "data", "config", "config_file", "sections", "failures", "files", "interrupts", "paths", "screen"},
]
HOMES = {
    "ray": {"runtime"},
    "mlflow": {"tracking", "exported"},
    "matplotlib": {"tracking"},
    "pyarrow": {"data"},
    "torchvision": {"data"},
    "sklearn": {"data"},
    "pydantic": {"config", "config_file", "sections", "checkpoint"},
    "yaml": {"config", "config_file"},
    "safetensors": {"checkpoint", "exported"},
    "click": {"cli"},
    "psutil": {"chaos", "bench", "data", "host_memory"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= (
                {node.module}
                if node.module != "ffdist"
                else {f"ffdist.{a.name}" for a in node.names if not a.name.isupper()}
            )
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down_and_libraries_stay_home(path):
    rows = {name: number for number, row in enumerate(ROWS) for name in row}
    for module in imports(path):
        top, *rest = module.split(".")
        if top == "ffdist" and room(path) != "__init__":
            assert rows[room(path)] <= rows[rest[0]], f"{path} must not import {module}"
            assert room(path) != "ff" or rest[0] == "ff", f"ff knows nothing but itself: {module}"
        elif top in HOMES:
            assert room(path) in HOMES[top], f"{top} is at home in {HOMES[top]}"
    assert not (room(path) == "pipeline" and {"ffdist.config", "ffdist.sections"} & imports(path)), (
        "pipeline takes plain values"
    )


def test_no_module_is_named_like_one_of_the_standard_library():
    """`sys.path[0]` is the package's own folder where run.py runs as a script, and Ray's workers inherit it."""
    taken = sys.stdlib_module_names | {"evaluate", "datasets", "ray", "mlflow", "torch"}
    names = {path.stem for path in PACKAGE.iterdir()} - {"__init__"}
    assert not names & taken
    assert not {path.stem for path in MODULES} & sys.stdlib_module_names
    assert not names & {"utils", "common", "helpers"}


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
    modules = [path for path in MODULES if room(path) in {"ff", "pipeline"} and path.stem != "__init__"]
    names = ", ".join(".".join(("ffdist", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in modules)
    needed = loaded_by(f"import ffdist.ff, ffdist.pipeline, {names}")
    assert not needed & (set(HOMES) | {"PIL", "rich", "filelock"})


@pytest.mark.parametrize("name", ffdist.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(ffdist, name).__doc__


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'training'"):
        ffdist.training  # noqa: B018


def test_files_stay_readable():
    long = {str(path): count for path in MODULES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_every_setting_is_used():
    from ffdist.config import Config

    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    read = {
        (getattr(node.value, "attr", None) or getattr(node.value, "id", None), node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute)
    }
    read |= {
        tuple(str(node.value).split(".")) for node in nodes if isinstance(node, ast.Constant)
    }  # MLflow's parameters
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
