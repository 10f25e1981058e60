"""A trace of the first chunks of a run: when each actor computed and when it waited."""

import json
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.pipeline.runner import Trained
from ffdist.storage.files import file_in, read_json

TIMELINE = "timeline.json"
"""File in the folder of a run, in the format of Chrome's trace viewer and Perfetto."""
MAX_CHUNKS = 200


class Span(NamedTuple):
    """An interval of an actor's time."""

    actor: str
    activity: str
    """`compute`, `wait` (for work), or `wait for negatives`."""
    chunk: int
    """Counted from the start of the pipeline."""
    start_s: float
    """Since the start of the first span."""
    duration_s: float


class Timeline:
    """The spans of the first chunks of a pipeline."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._chunks = 0

    def add(self, trained: Trained) -> None:
        """Adds a chunk."""
        if self._chunks == MAX_CHUNKS or not trained.stages[0].begun_at:
            return
        names = [f"stage {number}" for number in range(1, len(trained.stages) + 1)]
        reports = [
            *zip(names, trained.stages, strict=True),
            *([("readout", trained.readout)] if trained.readout else []),
        ]
        for actor, report in reports:
            free_at, idle_s = report.begun_at - report.wait_s, report.wait_s - report.negatives_wait_s
            for activity, start, duration in (
                ("wait", free_at, idle_s),
                ("wait for negatives", free_at + idle_s, report.negatives_wait_s),
                ("compute", report.begun_at, report.compute_s),
            ):
                if duration > 0:
                    self._spans.append(Span(actor, activity, self._chunks, start, duration))
        self._chunks += 1

    @property
    def spans(self) -> list[Span]:
        """All spans; times count from the start of the first."""
        start = min((span.start_s for span in self._spans), default=0.0)
        return [span._replace(start_s=span.start_s - start) for span in self._spans]

    def write(self, folder: Path) -> Path:
        """Writes the trace into the folder of a run and returns its path."""
        actors = sorted({span.actor for span in self._spans}, key=lambda actor: (actor == "readout", len(actor), actor))
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": actor}}
            for row, actor in enumerate(actors)
        ]
        events += [
            {
                "name": f"chunk {span.chunk}" if span.activity == "compute" else span.activity,
                "cat": span.activity,
                "ph": "X",
                "pid": 0,
                "tid": actors.index(span.actor),
                "ts": 1e6 * span.start_s,
                "dur": 1e6 * span.duration_s,
                "args": {"chunk": span.chunk},
            }
            for span in self.spans
        ]
        path = file_in(folder, TIMELINE)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return path


def read_timeline(folder: Path) -> list[Span]:
    """Returns the spans of a trace in the folder of a run; none if there is no trace.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    try:
        events = read_json(folder, TIMELINE)["traceEvents"]
        actors = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        return [_span(actors[event["tid"]], event) for event in events if event["ph"] == "X"]
    except FileNotFoundError:
        return []
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"it holds other events than ffdist writes ({error!r})") from error


def _span(actor: str, event: dict[str, Any]) -> Span:
    start_s, duration_s = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
    if not (isfinite(start_s) and isfinite(duration_s)):
        raise ValueError(f"a time is not finite ({start_s}, {duration_s})")
    return Span(str(actor), str(event["cat"]), int(event["args"]["chunk"]), start_s, duration_s)
