"""Ctrl-C, a cluster's SIGTERM, a terminal that is gone: the first asks a run to end in order, the second ends it."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ORDERLY_S = 8.0
"""Time that an orderly end may take; a cluster kills some time after it has asked."""
IMPORTING_S = 0.01
"""Time after which an interrupt that came amid an import comes again."""


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Has signals raise KeyboardInterrupt for the length of a `with` block, and yields what tells whether one has.

    Amid Python's own code for imports it comes a little later, because there it could leave the lock of all imports
    taken, for which other threads wait.
    """
    raised = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame and frame.f_code.co_filename == __file__:  # it came amid what defers another
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, IMPORTING_S)
            return
        raised.set()
        raise KeyboardInterrupt

    def again(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(heard[0])  # which may be a request to stop by now

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    timer = signal.getitimer(signal.ITIMER_REAL)  # somebody else's, such as that of pytest-timeout
    try:
        yield raised.is_set
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Watches for interrupts for the length of a `with` block, and yields what tells whether one came.

    Raises:
        KeyboardInterrupt: A second one came, or the orderly end took too long.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    late = threading.Timer(ORDERLY_S, lambda: os.kill(os.getpid(), signal.SIGINT))
    late.daemon = True

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _look_away()
        if asked.is_set():
            if number == signal.SIGHUP:  # a shell and the kernel both tell that the terminal is gone
                return
            raise KeyboardInterrupt
        asked.set()
        late.start()

    asking = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        asking.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in asking}
    try:
        yield asked.is_set
    finally:
        late.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _look_away() -> None:
    """Sends to nowhere what would be written to a terminal that is gone, and would fail."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123, a descriptor is needed
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere.fileno(), output)
