import importlib
import os
import signal
import sys
import time

import pytest

from ffdist.cli.options import report_errors
from ffdist.signals import STOP_SIGNALS, interrupts, stop_requests


@pytest.fixture(autouse=True)
def heeded():
    """As a shell without job control does not do for what it runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_amid_pythons_own_code_for_imports_comes_after_it(number, monkeypatch):
    """There it could leave the lock of all imports taken, and Ray's thread waiting for it."""
    frames = []

    class Finder:
        def find_spec(self, *names):
            frames.append(sys._getframe(1))

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nowhere_at_all")
    monkeypatch.setattr("ffdist.signals.IMPORT_DELAY_S", 1.0)
    with interrupts() as interrupted:
        signal.getsignal(number)(number, frames[0])
        assert not interrupted()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        assert interrupted()


def test_what_a_library_makes_of_an_interrupt_is_told_as_one(capsys):
    def swallow():
        with report_errors():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise RecursionError from None

    with pytest.raises(SystemExit) as ended:
        swallow()
    assert (ended.value.code, capsys.readouterr().err[:11]) == (130, "interrupted")


def test_an_alarm_of_somebody_else_is_no_interrupt():
    """Such as that of pytest-timeout, or of a user's own time limit."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        with interrupts() as interrupted, stop_requests(20) as stop_requested:
            signal.raise_signal(signal.SIGALRM)
        assert (rung, interrupted(), stop_requested()) == ([signal.SIGALRM], False, False)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("context", [interrupts, lambda: stop_requests(20)], ids=["interrupts", "stop_requests"])
def test_ignored_signals_stay_ignored(context):
    """As `nohup` and a script's background leave them: a run there is not stopped by Ctrl-C."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        with context() as requested:
            for number in STOP_SIGNALS:
                os.kill(os.getpid(), number)
            assert not requested()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_one_request_may_arrive_twice_and_an_orderly_stop_has_a_limit(number):
    """GNU timeout signals the process, and then its group."""
    with stop_requests(1.0) as requested:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requested()
        with pytest.raises(KeyboardInterrupt, match=r"not complete after 0\.5 s.* pipeline\.stop_timeout_s \(1\)"):
            time.sleep(60)


def test_a_second_ctrl_c_ends_a_run_at_once(monkeypatch):
    monkeypatch.setattr("ffdist.signals.DUPLICATE_S", 0.0)
    with stop_requests(600) as requested:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
