"""Import of modules of the user in the processes of actors and tasks."""

import os
import sys
from contextlib import suppress
from pathlib import Path


def import_settings() -> tuple[list[str], Path]:
    """Returns the import path and the working folder of this process, for `prepare_imports`."""
    return [str(Path(folder).absolute()) for folder in sys.path], Path.cwd()


def prepare_imports(import_path: list[str], working_folder: Path) -> None:
    """Makes this process import what the driver imports."""
    sys.path += [folder for folder in import_path if folder not in sys.path]
    with suppress(OSError):  # another node may not have the folder
        os.chdir(working_folder)  # modules of the user are imported from there
