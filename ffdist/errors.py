"""Errors that end a command or a run, with messages for the user."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """An invalid setting or input of the user. The message states the rule, the value and the fix."""


class RunFailed(RuntimeError):
    """A run that had to stop. The message gives the cause."""


class ActorLost(RunFailed):
    """An actor of the pipeline died or stalled. The run can be resumed from its last checkpoint."""


class ClusterStopped(RunFailed):
    """The Ray cluster was stopped during a run. The cluster no longer answers, and the run is marked as killed."""


@contextmanager
def as_warning(warn: Callable[[str], None], problem: str) -> Iterator[None]:
    """Reports an exception in the `with` block as a warning, and continues after the block.

    Args:
        warn: Prints a warning.
        problem: Start of the warning.
    """
    try:
        yield
    except Exception as error:
        warn(f"{problem} ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})")
