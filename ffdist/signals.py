"""Signals that stop a run: Ctrl-C, SIGTERM of a cluster, SIGUSR1 and SIGUSR2 of a scheduler, a closed terminal.

The first signal requests an orderly stop, with one last checkpoint. Signals that the process already ignores, for
example under `nohup`, stay ignored.
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
IMPORT_DELAY_S = 0.01
"""Delay after which a signal that arrived during an import is raised again."""
SHUTDOWN_S = 5.0
"""Part of `pipeline.stop_timeout_s` that is reserved for closing the tracker and Ray."""
DUPLICATE_S = 0.5
"""A second SIGINT within this time is a duplicate, because wrappers forward a signal that the terminal already sent."""

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turns signals into KeyboardInterrupt in the `with` block, and yields a predicate: has one been raised?

    An interrupt during an import is deferred: raising there could leave the import lock held and block other threads.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame and frame.f_code.co_filename == __file__:  # the signal arrived in this handler
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith("<frozen importlib"):
            _raise_later(IMPORT_DELAY_S, number)
            return
        interrupted.set()
        raise KeyboardInterrupt

    with _handle_signals(INTERRUPTS, interrupt):
        yield interrupted.is_set


@contextmanager
def stop_requests(timeout_s: float) -> Iterator[Callable[[], bool]]:
    """Watches for stop signals in the `with` block, and yields a predicate: has one arrived?

    Only a second Ctrl-C stops the run immediately. Other signals may arrive several times for one request: `timeout`
    signals both the process and its group.

    Args:
        timeout_s: Time from the first signal to the end of the process (`pipeline.stop_timeout_s`).

    Raises:
        KeyboardInterrupt: A second Ctrl-C arrived, or the orderly stop took too long.
    """
    requested, overdue = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    checkpoint_s = max(timeout_s - SHUTDOWN_S, timeout_s / 2)
    request_time, timers = 0.0, list[threading.Timer]()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal request_time
        if number == signal.SIGHUP:
            _discard_terminal_output()
        if overdue.is_set():
            raise KeyboardInterrupt(
                f"the last checkpoint was not complete after {checkpoint_s:g} s; the run is marked as killed; raise "
                f"pipeline.stop_timeout_s ({timeout_s:g}) if the platform grants more"
            )
        if not requested.is_set():
            requested.set()
            request_time = time.monotonic()
            timers.append(_raise_later(checkpoint_s, number, overdue))
        elif number == signal.SIGINT and time.monotonic() - request_time > DUPLICATE_S:
            raise KeyboardInterrupt

    with _handle_signals(STOP_SIGNALS, stop):
        try:
            yield requested.is_set
        finally:
            for timer in timers:
                timer.cancel()


@contextmanager
def _handle_signals(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Installs a handler in the `with` block.

    Skips signals that are ignored, and those with a handler in C (None), which could not be restored.
    """
    active = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in active}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def _raise_later(delay_s: float, number: int, overdue: threading.Event | None = None) -> threading.Timer:
    """Sends a signal to the main thread after a delay; sets `overdue` before."""

    def send() -> None:
        if overdue:
            overdue.set()
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    timer = threading.Timer(delay_s, send)
    timer.daemon = True
    timer.start()
    return timer


def _discard_terminal_output() -> None:
    """Redirects terminal output to /dev/null, because writing to a closed terminal fails."""
    with open(os.devnull, "w") as devnull:  # noqa: PTH123, a descriptor is needed
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(devnull.fileno(), output)
