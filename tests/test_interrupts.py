import importlib
import signal
import sys
import time

import pytest

from ffdist.cli.words import told
from ffdist.interrupts import interrupts


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
    monkeypatch.setattr("ffdist.interrupts.IMPORTING_S", 1.0)
    with interrupts() as interrupted:
        signal.getsignal(number)(number, frames[0])
        assert not interrupted()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        assert interrupted()
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 1, "of pytest-timeout, which goes on"


def test_what_a_library_makes_of_an_interrupt_is_told_as_one(capsys):
    def swallow():
        with told():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise RecursionError from None

    with pytest.raises(SystemExit) as ended:
        swallow()
    assert (ended.value.code, capsys.readouterr().err[:11]) == (130, "interrupted")
