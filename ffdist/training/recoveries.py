"""Recoveries of a run: how many failures it survives, and how long each recovery took."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ffdist.errors import ActorLost, RunFailed
from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.training.observer import Observer
from ffdist.training.provenance import differences
from ffdist.training.resume import Start

Recovery = dict[str, Any]
"""A recovery. `lost`: the lost actor, and the cause; `at`: time of its detection, in seconds since 1970; `step`: number
of minibatches done by then; `from`: number of minibatches done in the checkpoint that the run resumed from;
`differences`: changes of the hardware, if any; `placed`, `started`, `restored` and `replayed`: end of each phase, in
seconds since the detection."""


class Recoveries(Observer):
    """Records the failures of a run, and limits their number.

    Args:
        limit: Largest number of failures in a window.
        window_s: Length of the window.
        recoveries: Earlier recoveries of the run.
        note: Gets all recoveries after each change.
        warn: Gets a warning if the hardware differs from that of the checkpoint, and the same text as a tag.
    """

    def __init__(
        self,
        limit: int,
        window_s: float,
        recoveries: list[Recovery] | None = None,
        note: Callable[[list[Recovery]], None] = lambda recoveries: None,
        warn: Callable[..., None] = lambda text, **tags: None,
    ) -> None:
        self._limit, self._window_s, self._note, self._warn = limit, window_s, note, warn
        self._recent: deque[tuple[float, ActorLost]] = deque()
        self._recovering = False
        self.recoveries = recoveries or []
        """All recoveries of the run."""

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Compares the hardware with that of the checkpoint."""
        if text := differences(start.manifest, pipeline.hardware):
            self._warn(text, hardware_differences=text)
            if self._recovering:
                self.recoveries[-1]["differences"] = text
        self.mark("started")

    def on_restore(self, step: int) -> None:
        """Records the checkpoint that the run resumes from."""
        if self._recovering:
            self.recoveries[-1]["from"] = step
        self.mark("restored")

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Ends the recovery when all minibatches before the failure are done again."""
        if self._recovering and step >= self.recoveries[-1]["step"]:
            self.mark("replayed")
            self._recovering = False

    def add(self, lost: ActorLost, step: int) -> None:
        """Records a failure.

        Args:
            lost: The failure.
            step: Number of minibatches done.

        Raises:
            RunFailed: There were too many failures; the message names all failures in the window.
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
                f"{first}{history}; no more than {self._limit} failures in {self._window_s:g} s are tolerated "
                f"(pipeline.max_failures, pipeline.failure_window_s)"
            ) from first

    def begin(self, lost: str, step: int, at: float) -> None:
        """Records the start of a recovery.

        Args:
            lost: The lost actor, and the cause.
            step: Number of minibatches done.
            at: Time of the detection, in seconds since 1970.
        """
        self._recovering = True
        self.recoveries.append({"lost": lost, "at": at, "step": step})
        self._note(self.recoveries)

    def mark(self, event: str) -> None:
        """Records the end of a phase (`placed`, `started`, ...), if a recovery is in progress."""
        if self._recovering:
            self.recoveries[-1][event] = time.time() - self.recoveries[-1]["at"]
            self._note(self.recoveries)
