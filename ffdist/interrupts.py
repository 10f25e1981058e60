"""Ctrl-C, and a cluster's SIGTERM: the first asks a run to end in order, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ORDERLY_S = 8.0
"""Time that an orderly end may take; a cluster kills about 15 s or more after it has asked."""


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
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        late.start()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        late.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
