"""Signals during training: who notes them, who ignores them, and that no process outlives the one it works for."""

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import pytest

from batude_fx.training.interruption import Interruption, outlive_first_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are stopped by other means")


def _sleep(started: Event) -> None:
    outlive_first_signals()
    started.set()
    time.sleep(60)


def test_a_worker_outlives_the_signals_to_its_group_but_not_its_end() -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    worker = context.Process(target=_sleep, args=(started,))
    worker.start()
    assert started.wait(60)
    assert worker.pid
    os.kill(worker.pid, signal.SIGINT)
    worker.terminate()  # as a scheduler does with the whole group
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing does when the main process ends
    worker.join(10)
    assert worker.exitcode == -signal.SIGTERM


def test_a_signal_is_noted_and_acknowledged(capfd: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    with interruption.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received
    assert "stopping after this step" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption = Interruption()
        with interruption.noted():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not interruption.received
    finally:
        signal.signal(signal.SIGINT, before)
