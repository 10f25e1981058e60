"""What a run survives: lost parts, as long as they are not too many."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ffdist.config import RunFailed

Recovery = dict[str, Any]
"""`lost`: what, and why; `at`: when that was noticed, in seconds since 1970; `step`: minibatches done by then;
`from`: those of the commit that it went on from; `differences` of the hardware from before, if any; and, in seconds
since it was noticed, when the parts were `placed`, `started`, `restored`, and everything was `replayed`."""


class PartLost(RunFailed):
    """A part of the pipeline died or does nothing any more; the run can go on from its last commit."""


@contextmanager
def as_warning(warn: Callable[[str], None], what: str) -> Iterator[None]:
    """Reports an exception in a `with` block as a warning, so that what follows is still done.

    Args:
        warn: Gets the text.
        what: Start of the text: what failed.
    """
    try:
        yield
    except Exception as error:
        warn(f"{what} ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})")


class ClusterStopped(RunFailed):
    """The Ray cluster was stopped under the driver; the run is marked as killed, and nothing of the cluster answers."""


class Failures:
    """The failures of a run, and whether there are too many.

    Args:
        limit: Most of them in a window.
        window_s: Length of the window.
        recoveries: What the run recovered from before.
        note: Keeps what it recovers from.
    """

    def __init__(
        self,
        limit: int,
        window_s: float,
        recoveries: list[Recovery] | None = None,
        note: Callable[[list[Recovery]], None] = lambda recoveries: None,
    ) -> None:
        self._limit, self._window_s, self._note = limit, window_s, note
        self._recent: deque[tuple[float, PartLost]] = deque()
        self._recovering = False
        self.recoveries = recoveries or []
        """All that the run recovered from."""

    def take(self, lost: PartLost, step: int) -> None:
        """Notes a failure.

        Args:
            lost: What was lost.
            step: Minibatches done.

        Raises:
            RunFailed: It is one too many; the text tells the first of the window and what followed.
        """
        now = time.monotonic()
        self._recent.append((now, lost))
        self.begin(str(lost), step, time.time())
        while self._recent[0][0] < now - self._window_s:
            self._recent.popleft()
        if len(self._recent) > self._limit:
            (start, first), *others = self._recent
            history = "".join(f"; {at - start:.0f} s later {other}" for at, other in others)
            raise RunFailed(
                f"{first}{history}; no more than {self._limit} failures in {self._window_s:g} s are taken "
                f"(pipeline.max_failures, pipeline.failure_window_s)"
            ) from first

    def begin(self, lost: str, step: int, at: float) -> None:
        """Notes that a recovery begins.

        Args:
            lost: What was lost.
            step: Minibatches done.
            at: When that was noticed, in seconds since 1970.
        """
        self._recovering = True
        self.recoveries.append({"lost": lost, "at": at, "step": step})
        self._note(self.recoveries)

    def note_differences(self, differences: str) -> None:
        """Notes in what the hardware of the newest recovery differs from before."""
        self.recoveries[-1]["differences"] = differences
        self._note(self.recoveries)

    def mark(self, event: str, step: int) -> None:
        """Notes how far a recovery is, where one is under way.

        Args:
            event: `placed`, `started`, `restored`, or `chunk`, after each.
            step: Minibatches done.
        """
        if not self._recovering:
            return
        recovery = self.recoveries[-1]
        if event == "restored":
            recovery["from"] = step
        if event == "chunk":
            if step < recovery["step"]:
                return
            event, self._recovering = "replayed", False
        recovery[event] = time.time() - recovery["at"]
        self._note(self.recoveries)
