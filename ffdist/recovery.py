"""Going on after a loss: another pipeline, from the last commit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from ffdist.checkpoint import CommitError, Commits, DamagedCommit
from ffdist.config import RunFailed
from ffdist.failures import Failures, PartLost
from ffdist.launch import Pipeline
from ffdist.loop import Loop
from ffdist.start import Start, go_on


def run_to_the_end(
    pipelines: Iterator[AbstractContextManager[Pipeline]],
    loop_from: Callable[[Start], Loop],
    commits: Commits,
    start: Start,
    failures: Failures,
    asked_to_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Loop:
    """Runs a loop on one pipeline after another, each going on where the one before it lost a part.

    Args:
        pipelines: To run on; another is asked for after a loss.
        loop_from: Makes a loop that starts at a given place.
        commits: Of the run.
        start: Where the run starts.
        failures: Says when there are too many losses.
        asked_to_stop: Says when to stop.
        say: Tells the user.

    Returns:
        The loop that came to the end, or was asked to stop.
    """
    for pipeline in pipelines:
        loop = loop_from(start)
        try:
            with pipeline as parts:
                loop.run(parts, asked_to_stop)
            return loop
        except PartLost as lost:
            failures.take(lost, loop.step)
            say(f"{lost}; {loop.kept}")
            try:
                start = go_on(commits, start, loop.last)
            except CommitError as error:
                way_out = "; --resume it with --resume-from-older" if isinstance(error, DamagedCommit) else ""
                raise RunFailed(f"{lost}, and the run cannot go on: {error}{way_out}") from error
    raise AssertionError("there is always another pipeline")
