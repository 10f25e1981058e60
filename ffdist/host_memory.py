"""Host memory that is available to this process."""

import sys
from pathlib import Path

import psutil

from ffdist.errors import ConfigError

LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files with the limit and the usage of a control group, in versions 2 and 1."""


def available_bytes(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Returns the host memory available to this process, within the limits of its container or service.

    Args:
        groups: Folder of the kernel's control groups.
        membership: File that names the control groups of this process.
    """
    available = int(psutil.virtual_memory().available)
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            root = groups / controllers
            group = root / name.lstrip("/")  # in a container, it may be visible as the root
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                available = min(available, *(_available_in_group(folder, *files) for files in LIMITS))
    return max(0, available)


def _available_in_group(folder: Path, limit_file: str, usage_file: str) -> int:
    try:
        limit, usage = int((folder / limit_file).read_text()), int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit: "max", or no such file
        return sys.maxsize
    # The kernel reclaims inactive file pages first.
    return limit - usage + int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))


def check(needed_bytes: int, purpose: str) -> None:
    """Checks that memory is available.

    Args:
        needed_bytes: Memory that is needed.
        purpose: Use of the memory, for the error.

    Raises:
        ConfigError: Too little memory is available.
    """
    available = available_bytes()
    if needed_bytes > available:
        raise ConfigError(
            f"{purpose} must fit into the available host memory (needed: {needed_bytes / 1e9:,.1f} GB, available: "
            f"{available / 1e9:,.1f} GB); make model.layers smaller, or free memory"
        )
