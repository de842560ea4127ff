"""When a run must stop early. Whole commands that do: tests/distributed/test_launch.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.run import interruption
from nemo_kd.run.interruption import SIGNALS, Interruption, Requeue


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_reason_and_nothing_else(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"rank 0 on {os.uname().nodename} received {number.name}"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_on_the_way_out_signals_stay_without_effect():
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises(Requeue), Interruption():
            raise Requeue("enough")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_signal_held_back_before_is_delivered():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        # To this thread: those that other tests left behind do not hold it back.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with Interruption() as stop:
            assert stop.reason.endswith("received SIGUSR1")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


@pytest.mark.parametrize("max_time", ["4h", "04:00:00", "1:2:3:4", "2160000", ""])
def test_a_time_that_is_none_is_refused(max_time):
    with pytest.raises(
        ConfigError,
        match=r"exp_manager\.max_time_per_run: '.*' is not DD:HH:MM:SS, for example",
    ):
        Interruption(max_time)


def test_time_counts_from_the_start_of_the_process(monkeypatch):
    started_s = time.time() - 86_400 - 3_600 - 60 - 0.5
    monkeypatch.setattr(
        interruption.psutil.Process, "create_time", lambda process: started_s
    )
    assert Interruption("01:01:01:00").reason == "max_time_per_run=01:01:01:00 is over"
    with Interruption("01:01:01:02") as stop:
        assert stop.reason is None
        time.sleep(1.6)
        assert stop.reason == "max_time_per_run=01:01:01:02 is over"


def test_outside_the_main_thread_signals_are_left_alone():
    handlers = []

    def run() -> None:
        with Interruption("00:00:00:00") as stop:
            handlers.append(signal.getsignal(signal.SIGTERM))
            handlers.append(stop.reason)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL, "max_time_per_run=00:00:00:00 is over"]
