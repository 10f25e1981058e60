"""Who computed and who waited when: the first chunks of a run, for people and for trace viewers."""

import json
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.files import file_in, read_json
from ffdist.pipeline.runner import Trained

TIMELINE = "timeline.json"
"""In the folder of a run, as Chrome's and Perfetto's viewers read it."""
CHUNKS = 200
"""Chunks that are kept."""


class Span(NamedTuple):
    """What a part did for a while."""

    part: str
    what: str
    """`compute`, `wait` for work, or `wait for negatives`."""
    chunk: int
    """Counted from the start of the pipeline."""
    begun_s: float
    """From the start of the first."""
    took_s: float


class Timeline:
    """The spans of the first chunks of a pipeline."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._chunks = 0

    def add(self, trained: Trained) -> None:
        """Takes in when the parts worked on a chunk."""
        if self._chunks == CHUNKS or not trained.stages[0].begun_at:
            return
        names = [f"stage {number}" for number in range(1, len(trained.stages) + 1)]
        for part, report in zip([*names, "readout"], [*trained.stages, trained.readout], strict=True):
            free_at, idle_s = report.begun_at - report.wait_s, report.wait_s - report.negatives_wait_s
            for what, begun, took in (
                ("wait", free_at, idle_s),
                ("wait for negatives", free_at + idle_s, report.negatives_wait_s),
                ("compute", report.begun_at, report.compute_s),
            ):
                if took > 0:
                    self._spans.append(Span(part, what, self._chunks, begun, took))
        self._chunks += 1

    @property
    def spans(self) -> list[Span]:
        """What was taken in, from the start of the first."""
        start = min((span.begun_s for span in self._spans), default=0.0)
        return [span._replace(begun_s=span.begun_s - start) for span in self._spans]

    def write(self, folder: Path) -> Path:
        """Writes the trace into the folder of a run; microseconds, as the format has it."""
        parts = sorted({span.part for span in self._spans}, key=lambda part: (part == "readout", len(part), part))
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": part}}
            for row, part in enumerate(parts)
        ]
        events += [
            {
                "name": f"chunk {span.chunk}" if span.what == "compute" else span.what,
                "cat": span.what,
                "ph": "X",
                "pid": 0,
                "tid": parts.index(span.part),
                "ts": 1e6 * span.begun_s,
                "dur": 1e6 * span.took_s,
                "args": {"chunk": span.chunk},
            }
            for span in self.spans
        ]
        path = file_in(folder, TIMELINE)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return path


def read_timeline(folder: Path) -> list[Span]:
    """Returns the spans that were written into the folder of a run; none where there is no file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    try:
        events = read_json(folder, TIMELINE)["traceEvents"]
        parts = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        return [_span(parts[event["tid"]], event) for event in events if event["ph"] == "X"]
    except FileNotFoundError:
        return []
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"it holds other events than ffdist writes ({error!r})") from error


def _span(part: str, event: dict[str, Any]) -> Span:
    begun_s, took_s = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
    if not (isfinite(begun_s) and isfinite(took_s)):
        raise ValueError(f"a time is not finite ({begun_s}, {took_s})")
    return Span(str(part), str(event["cat"]), int(event["args"]["chunk"]), begun_s, took_s)
