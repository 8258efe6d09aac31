"""A version is read and decoded while it is made, and counts only as its manifest says."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rl_links import link
from rl_models import bits, nudge, pair, rollout, same, trainer

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, FaultError, WireError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.reports import UpdateReport
from planaria.rl_sync.transports.feed import Ahead, Piece
from planaria.rl_sync.transports.relay import RelayFeed
from planaria.rl_sync.versions import ahead as ahead_module
from planaria.rl_sync.versions.manifest import Entry, content_hash


class Beside:
    """Holds a publisher at its second group of blocks until a receiver has begun on the first."""

    def __init__(self) -> None:
        self.groups, self.overlapped = 0, False
        self.decoding = threading.Event()

    def encode(self, *_: Any) -> None:
        self.groups += 1
        if self.groups == 2:
            self.overlapped = self.decoding.wait(60)

    def decode(self, *_: Any) -> None:
        self.decoding.set()


@contextmanager
def beside(*subscribers: Subscriber, version: int) -> Iterator[tuple[Beside, list[Future[Any]]]]:
    """Receivers that wait for a version."""
    made = Beside()
    callbacks = {"rl.publish.encode": made.encode, "rl.ahead.block": made.decode}
    with ThreadPoolExecutor(len(subscribers)) as pool, points.armed(callbacks=callbacks):
        yield made, [pool.submit(s.update, version) for s in subscribers]


def report_of(result: Future[Any]) -> UpdateReport:
    report = result.result(60)
    assert isinstance(report, UpdateReport)
    return report


@pytest.mark.parametrize("codec", ["gap_ulp", "exponent"])
def test_blocks_are_decoded_while_others_are_encoded(codec: str) -> None:
    model = trainer()
    with pair(model, codec=codec, threads=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        for version in (1, 2):
            nudge(model, version)
            with beside(subscriber, version=version) as (found, (result,)):
                published = publisher.publish(version)
                report = report_of(result)
            assert found.overlapped
            assert found.groups > 1
            assert same(model, there)
            assert subscriber.audit()
            assert (report.version, report.codec, report.changed) == (
                version, codec, published.changed,
            )  # fmt: skip
            assert 0 < report.ahead_bytes < report.bytes
            # Nothing was read twice.
            assert report.bytes == published.bytes


def test_without_overlap_the_test_above_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a publisher that gives nothing away before it has published."""
    model = trainer()
    monkeypatch.setattr(Beside, "decode", lambda *_: None)
    with pair(model, threads=1) as (publisher, (subscriber,), _):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        monkeypatch.setattr("planaria.rl_sync.versions.draft.Drafts.add", lambda *_: None)
        with beside(subscriber, version=1) as (found, (result,)):
            found.decoding.wait = lambda timeout=None: False  # type: ignore[method-assign]
            publisher.publish(1)
            assert report_of(result).ahead_bytes == 0
        assert not found.overlapped


@pytest.mark.parametrize("place", ["rl.publish.encode", "rl.publish.commit"])
def test_a_version_that_is_given_up_leaves_no_trace(place: str) -> None:
    model = trainer()
    with pair(model, threads=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        decoding = threading.Event()

        def fail(*_: Any) -> None:
            if hits.append(1) or len(hits) == (2 if place == "rl.publish.encode" else 1):
                assert decoding.wait(60)
                raise FaultError("boom")

        hits: list[int] = []
        callbacks = {place: fail, "rl.ahead.block": lambda *_: decoding.set()}
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(subscriber.update, 1)
            with points.armed(callbacks=callbacks), pytest.raises(FaultError):
                publisher.publish(1)
            assert bits(there) == old
            assert subscriber.version == 0
            nudge(model, 2)  # what was decoded is not what comes
            publisher.publish(1)
            report_of(result)
        assert same(model, there)
        assert subscriber.audit()


def forged(subscriber: Subscriber, change: Callable[[Piece], Piece]) -> None:
    asked = subscriber._feed.ahead

    def other(*args: Any) -> Ahead:
        got = asked(*args)
        return got if got.piece is None else got._replace(piece=change(got.piece))

    subscriber._feed.ahead = other  # type: ignore[method-assign]


def _flipped(piece: Piece, named: bool) -> Piece:
    payloads = [p[:-1] + bytes([p[-1] ^ 1]) for p in piece.payloads]
    entries = [
        replace(e, hash=content_hash(p)) if named else e
        for e, p in zip(piece.entries, payloads, strict=True)
    ]
    return replace(piece, payloads=tuple(payloads), entries=tuple(entries))


def _with(piece: Piece, **changes: Any) -> Piece:
    return replace(piece, entries=tuple(replace(e, **changes) for e in piece.entries))


FORGERIES: dict[str, Callable[[Piece], Piece]] = {
    "flipped": lambda p: _flipped(p, False),
    "flipped and named so": lambda p: _flipped(p, True),
    "no such block": lambda p: _with(p, block=10**6),
    "one block": lambda p: _with(p, block=0),
    "more changes than elements": lambda p: _with(p, changed=1 << 50),
    "other codec": lambda p: _with(p, codec="bitmap"),
    "no codec": lambda p: _with(p, codec="zip"),
    "no model": lambda p: _with(p, model=-1),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_what_comes_ahead_is_not_believed(kind: str) -> None:
    model = trainer()
    with pair(model, codec="gap_raw", threads=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        forged(subscriber, FORGERIES[kind])
        nudge(model, 1)
        with beside(subscriber, version=1) as (found, (result,)):
            found.decoding.set()  # some of these are refused before they are decoded
            publisher.publish(1)
            report_of(result)
        assert same(model, there)
        assert subscriber.audit()


def test_what_compares_it_with_the_manifest_is_what_does_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sabotage: without it the digest still refuses the version."""
    model = trainer()
    with pair(model, codec="gap_raw", threads=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        forged(subscriber, FORGERIES["flipped and named so"])
        monkeypatch.setattr(ahead_module, "_same", lambda *_: True)
        nudge(model, 1)
        with beside(subscriber, version=1) as (_, (result,)):
            publisher.publish(1)
            with pytest.raises(CorruptError, match="digest"):
                result.result(60)
        assert bits(there) == old
        assert subscriber.version == 0


def test_a_connection_that_is_cut_meanwhile() -> None:
    model = trainer()
    with pair(model, receivers=0, threads=1) as (publisher, _, _), link(publisher.url) as between:
        there = rollout(model)
        with Subscriber(there, between.url, timeout=60) as subscriber:
            publisher.publish(0)
            subscriber.update()
            nudge(model, 1)
            with (
                beside(subscriber, version=1) as (_, (result,)),
                points.armed(callbacks={"rl.ahead.block": lambda *_: between.cut()}),
            ):
                publisher.publish(1)
                report_of(result)
        assert same(model, there)


def test_relays_hand_pieces_on_and_the_trainer_sends_each_once() -> None:
    model = trainer()
    with Publisher(model, "tcp://127.0.0.1:0", block_elements=1500, threads=1) as publisher:
        first, second = (rollout(model, model.norm.weight.dtype) for _ in range(2))
        with (
            Subscriber(first, publisher.url, relay="tcp://127.0.0.1:0") as near,
            Subscriber(second, near.relay_url or "") as far,
        ):
            publisher.publish(0)
            near.update()
            far.update()
            sent = publisher.sent_bytes
            nudge(model, 1)
            with beside(near, far, version=1) as (found, results):
                published = publisher.publish(1)
                reports = [report_of(r) for r in results]
            assert found.overlapped
            assert bits(first) == bits(second) == bits(model)
            assert max(r.ahead_bytes for r in reports) > 0
            assert publisher.sent_bytes - sent <= published.bytes


def test_a_relay_does_not_keep_what_was_damaged_on_the_way() -> None:
    model = trainer()
    with pair(model, receivers=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        relay = RelayFeed(subscriber._feed)
        damage = [True]
        chain = subscriber._feed.chain

        def damaged(*args: Any) -> list[Any]:
            return [
                replace(o, read=lambda n, d, o=o: [
                    x[:-1] + b"?" if damage[0] else x for x in o.read(n, d)
                ])
                for o in chain(*args)
            ]  # fmt: skip

        subscriber._feed.chain = damaged  # type: ignore[method-assign]
        behind = Subscriber(there, relay)
        with pytest.raises(CorruptError):
            behind.update()
        damage[0] = False
        behind.update()
        assert same(model, there)


def test_pieces_cross_as_messages() -> None:
    entry = Entry(3, "gap_raw", 0, 4, 2, "0" * 32)
    piece = Piece("d", 1, (b"model",), (entry,), (b"data",))
    assert Piece.from_message(*piece.to_message()) == piece
    header, payloads = piece.to_message()
    for wrong in ({"models": 2}, {"entries": [[1]]}, {"models": "x"}, {"entries": None}):
        with pytest.raises(WireError, match="piece"):
            Piece.from_message(header | wrong, payloads)


def test_who_stands_elsewhere_hears_so_at_once() -> None:
    model = trainer()
    with pair(model) as (publisher, _, _):
        publisher.publish(0)
        publisher.publish(1)
        log = publisher.log
        assert log is not None
        for have in ((0, "0" * 32), (7, "0" * 32)):
            assert log.ahead(have, 0, None, Deadline(60), 60.0).over
        newest = log.newest
        assert newest is not None
        log.drafts.begin(1, newest.digest)
        assert log.ahead((1, "0" * 32), 0, None, Deadline(60), 60.0).over
        assert log.ahead((1, newest.digest[0]), 5, None, Deadline(60), 60.0).over
        assert log.ahead((1, newest.digest[0]), 0, None, Deadline(60), 0.0) == Ahead(None, False)
