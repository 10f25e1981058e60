"""Compiles the kernels of kernels.c when the package is built. It is a build hook of hatchling, see pyproject.toml.

Without a C compiler, the package is built without kernels.
"""

import os
import subprocess
import sysconfig
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = Path("ffdist/ff/kernels.c"), Path("ffdist/ff/_kernels.so")
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]
"""Without contraction, products are not fused with sums, so that all instruction sets give the same bits."""


class CompileKernels(BuildHookInterface[Any]):
    """Adds the compiled kernels to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the kernels: into the source folder if the package is installed as editable."""
        if self.target_name != "wheel":
            return
        self._folder = TemporaryDirectory()  # it lasts until the wheel is written
        target = Path(self.root, LIBRARY) if version == "editable" else Path(self._folder.name, LIBRARY.name)
        target.unlink(missing_ok=True)
        source, compiler = Path(self.root, SOURCE), os.environ.get("CC", "cc").split()
        digest = f'-DSOURCE_SHA256="{sha256(source.read_bytes()).hexdigest()}"'
        command = [*compiler, *FLAGS, digest, str(source), "-o", str(target), "-lm"]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"ffdist is built without kernels (pipeline.executor=fused): {error}")
            return
        if version != "editable":
            build_data["force_include"][str(target)] = str(LIBRARY)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{platform}"
