"""Signals that ask a run to stop: Ctrl-C, SIGTERM of a cluster, SIGUSR1 and SIGUSR2 of a scheduler, a closed terminal.

The first one asks for an orderly stop: one last checkpoint, then the end. Signals that the process already ignores, as
`nohup` and shell scripts arrange it, stay ignored.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (*INTERRUPTS, signal.SIGHUP)
IMPORTING_S = 0.01
"""Delay after which a signal that arrived during an import is raised again."""
CLOSING_S = 5.0
"""Part of `pipeline.stop_timeout_s` that is reserved for closing the tracker and Ray."""
REPEAT_S = 0.5
"""A second Ctrl-C within this time is the same one: wrappers forward what the terminal already sent."""

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turns signals into KeyboardInterrupt inside a `with` block, and yields a predicate: has one been raised?

    An interrupt during an import is deferred: raising there could leave the import lock held and block other threads.
    """
    raised = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame and frame.f_code.co_filename == __file__:  # the signal arrived in this very handler
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith("<frozen importlib"):
            _raise_later(IMPORTING_S, number)
            return
        raised.set()
        raise KeyboardInterrupt

    with _handled(INTERRUPTS, interrupt):
        yield raised.is_set


@contextmanager
def stop_requests(timeout_s: float) -> Iterator[Callable[[], bool]]:
    """Watches for stop signals inside a `with` block, and yields a predicate: has one arrived?

    Only a second Ctrl-C ends the run at once. Other signals may come more than once for one request: `timeout` signals
    both the process and its group.

    Args:
        timeout_s: Time until the process must have ended (`pipeline.stop_timeout_s`).

    Raises:
        KeyboardInterrupt: A second Ctrl-C arrived, or the orderly stop took too long.
    """
    requested, overdue = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    orderly_s = max(timeout_s - CLOSING_S, timeout_s / 2)
    requested_at, timers = 0.0, list[threading.Timer]()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal requested_at
        if number == signal.SIGHUP:
            _discard_terminal_output()
        if overdue.is_set():
            raise KeyboardInterrupt(
                f"the last checkpoint was not complete after {orderly_s:g} s; the run is marked as killed; raise "
                f"pipeline.stop_timeout_s ({timeout_s:g}) if the platform grants more"
            )
        if not requested.is_set():
            requested.set()
            requested_at = time.monotonic()
            timers.append(_raise_later(orderly_s, number, overdue))
        elif number == signal.SIGINT and time.monotonic() - requested_at > REPEAT_S:
            raise KeyboardInterrupt

    with _handled(STOP_SIGNALS, stop):
        try:
            yield requested.is_set
        finally:
            for timer in timers:
                timer.cancel()


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Installs a handler, and restores the previous ones.

    Signals that are ignored stay so, and those that another library handles in C (None) cannot be restored.
    """
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _raise_later(delay_s: float, number: int, overdue: threading.Event | None = None) -> threading.Timer:
    """Sends the main thread a signal after a delay; sets `overdue` first."""

    def send() -> None:
        if overdue:
            overdue.set()
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    timer = threading.Timer(delay_s, send)
    timer.daemon = True
    timer.start()
    return timer


def _discard_terminal_output() -> None:
    """Redirects output to /dev/null where it goes to a terminal that is gone: writing to it would fail."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123, a descriptor is needed
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere.fileno(), output)
