import importlib
import os
import signal
import sys
import time

import pytest

from ffdist.cli.options import report_errors
from ffdist.signals import STOP_SIGNALS, interrupts, stop_requests


@pytest.fixture(autouse=True)
def enable_interrupts():
    """Enables SIGINT, which background jobs of a shell without job control ignore."""
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_during_an_import_is_deferred(number, monkeypatch):
    """Raising during an import could leave the import lock held and block Ray's thread."""
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


def test_interrupt_that_a_library_converts_is_reported_as_an_interrupt(capsys):
    def convert_interrupt():
        with report_errors():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise RecursionError from None

    with pytest.raises(SystemExit) as exit_info:
        convert_interrupt()
    assert (exit_info.value.code, capsys.readouterr().err[:11]) == (130, "interrupted")


def test_sigalrm_is_not_an_interrupt():
    """SIGALRM may come from pytest-timeout, or from a time limit of the user."""
    alarms = []
    previous_handler = signal.signal(signal.SIGALRM, lambda number, frame: alarms.append(number))
    try:
        with interrupts() as interrupted, stop_requests(20) as stop_requested:
            signal.raise_signal(signal.SIGALRM)
        assert (alarms, interrupted(), stop_requested()) == ([signal.SIGALRM], False, False)
    finally:
        signal.signal(signal.SIGALRM, previous_handler)


@pytest.mark.parametrize("context", [interrupts, lambda: stop_requests(20)], ids=["interrupts", "stop_requests"])
def test_ignored_signals_stay_ignored(context):
    """Signals are ignored under `nohup` and in background jobs of scripts, where Ctrl-C must not stop a run."""
    previous_handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        with context() as requested:
            for number in STOP_SIGNALS:
                os.kill(os.getpid(), number)
            assert not requested()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_duplicate_signals_are_one_request_and_an_orderly_stop_has_a_timeout(number):
    """GNU timeout signals the process, and then its process group."""
    with stop_requests(1.0) as requested:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requested()
        with pytest.raises(KeyboardInterrupt, match=r"not complete after 0\.5 s.* pipeline\.stop_timeout_s \(1\)"):
            time.sleep(60)


def test_second_ctrl_c_stops_a_run_immediately(monkeypatch):
    monkeypatch.setattr("ffdist.signals.DUPLICATE_S", 0.0)
    with stop_requests(600) as requested:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
