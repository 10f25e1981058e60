"""What a run survives: lost parts, as long as they are not too many."""

import time
from collections import deque
from typing import Any

from ffdist.config import RunFailed


class PartLost(RunFailed):
    """A part of the pipeline died or does nothing any more; the run can go on from its last commit."""


class Failures:
    """The failures of a run, and whether there are too many.

    Args:
        limit: Most of them in a window.
        window_s: Length of the window.
    """

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit, self._window_s = limit, window_s
        self._recent: deque[tuple[float, PartLost]] = deque()
        self.recoveries: list[dict[str, Any]] = []
        """What was lost, and the seconds from noticing it to each step of recovering from it."""

    def take(self, lost: PartLost) -> None:
        """Notes a failure.

        Raises:
            RunFailed: It is one too many; the text tells the first of the window and what followed.
        """
        now = time.monotonic()
        self._recent.append((now, lost))
        self.recoveries.append({"lost": str(lost)})
        while self._recent[0][0] < now - self._window_s:
            self._recent.popleft()
        if len(self._recent) > self._limit:
            (start, first), *others = self._recent
            history = "".join(f"; {at - start:.0f} s later {other}" for at, other in others)
            raise RunFailed(
                f"{first}{history}; no more than {self._limit} failures in {self._window_s:g} s are taken "
                f"(pipeline.max_failures, pipeline.failure_window_s)"
            ) from first

    def mark(self, event: str) -> None:
        """Notes when a step of recovering from the last failure, if there was one, was done for the first time."""
        if self.recoveries:
            self.recoveries[-1].setdefault(f"{event}_s", time.monotonic() - self._recent[-1][0])
