"""How the trainer's ranks hear of a decision."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.wire import Listener
from planaria.errors import SyncError, WireError
from planaria.rl_sync.links import RankHub, RankLink

TOKEN = b"the token of this test's job"


def test_ranks_that_wait_hear_the_decision_even_if_rank_0_closes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = RankHub(2, "127.0.0.1", TOKEN, timeout=60)
    link = RankLink(1, hub.address, TOKEN, Deadline(60))
    send = Connection.send

    def slow(self: Connection, header: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if header == {"ok": 1}:
            time.sleep(0.2)
        send(self, header, *args, **kwargs)

    monkeypatch.setattr(Connection, "send", slow)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(link.say, "version 1", {}, Deadline(60))
        hub.collect("version 1", Deadline(60))
        hub.decide("version 1", {"ok": 1})
        hub.close()
        assert heard.result() == {"ok": 1}
    link.close()


def test_a_refused_version_is_decided_anew_when_it_is_tried_again() -> None:
    hub = RankHub(2, "127.0.0.1", TOKEN, timeout=60)
    link = RankLink(1, hub.address, TOKEN, Deadline(60))
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(link.say, "version 1", {"failed": "boom"}, Deadline(60))
        with pytest.raises(SyncError, match="boom"):
            hub.collect("version 1", Deadline(60))
        hub.decide("version 1", {"refused": "boom"})
        with pytest.raises(SyncError, match="boom"):
            heard.result()
        again = pool.submit(link.say, "version 1", {}, Deadline(60))
        assert list(hub.collect("version 1", Deadline(60))) == [1]
        hub.decide("version 1", {"ok": 2})
        assert again.result() == {"ok": 2}
        undecided = pool.submit(link.say, "version 2", {}, Deadline(60))
        hub.collect("version 2", Deadline(60))
        hub.close()
        with pytest.raises(SyncError, match="closed its publisher"):
            undecided.result()
    link.close()


def test_a_hub_that_could_not_accept_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failed = Listener.accept, threading.Event()

    def once(self: Listener, deadline: Deadline) -> Connection:
        if not failed.is_set():
            failed.set()
            raise WireError("too many open files")
        return accept(self, deadline)

    monkeypatch.setattr(Listener, "accept", once)
    hub = RankHub(2, "127.0.0.1", TOKEN, timeout=30)
    link = RankLink(1, hub.address, TOKEN, Deadline(30))
    assert failed.is_set()
    link.close()
    hub.close()
