"""Work in which no interrupt comes."""

import signal
import threading
import time

import pytest

from planaria.core.interrupts import uninterrupted


def test_what_it_raises_is_raised() -> None:
    def work() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        uninterrupted(work)


@pytest.mark.usefixtures("interruptible")
def test_interrupts_are_raised_when_the_work_has_ended() -> None:
    done, stopped, main = [], threading.Event(), threading.main_thread().ident
    assert main is not None

    def work() -> None:
        for part in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
            done.append(part)
        assert stopped.wait(60)

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work, stopped.set)
    assert done == [0, 1, 2]


def test_it_is_done_where_there_are_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    monkeypatch.setattr(threading.Thread, "start", start)
    uninterrupted(lambda: done.append(1))
    assert done == [1]
