"""Processes that die, stop or lie: a rollout holds exactly one whole version of the trainer's."""

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from rl_jobs import killed_and_stopped, killed_while_writing, replaced, state
from rl_links import link
from rl_models import bits, nudge, pair, rollout, same, trainer

from planaria.core import points, rpc, wire
from planaria.core.deadline import Deadline
from planaria.errors import (
    CorruptError,
    FaultError,
    FormatError,
    PlanariaError,
    SyncError,
    WireError,
)
from planaria.rl_sync import Subscriber
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.transports.feed import Offer
from planaria.rl_sync.transports.relay import RelayFeed
from planaria.rl_sync.transports.urls import open_feed
from planaria.rl_sync.versions.manifest import Entry, Manifest


def test_receivers_killed_and_stopped_in_the_middle_of_an_apply(
    free_port: int, tmp_path: Path
) -> None:
    states, healthy, _, stopped = run_ranks(
        4, killed_and_stopped, free_port, str(tmp_path), init_group=False, timeout=90,
        expect_dead=[2],
    )  # fmt: skip
    assert healthy == [(v, states[v], True) for v in range(4)]
    assert stopped[0] == (0, states[0], True)
    assert stopped[-1] == (3, states[3], True)
    assert all(served == (served[0], states[served[0]], True) for served in stopped)


def test_a_trainer_is_killed_and_another_takes_its_place(free_port: int, tmp_path: Path) -> None:
    _, followed, _ = run_ranks(
        3, replaced, free_port, str(tmp_path), init_group=False, timeout=90, expect_dead=[0]
    )
    first, served, kept, then, second = followed
    assert served == kept == first
    assert then == second != first


@pytest.mark.parametrize("fault", ["rl.folder.write", "rl.folder.commit"])
def test_a_trainer_killed_while_it_publishes_leaves_its_folder_whole(
    fault: str, tmp_path: Path
) -> None:
    run_ranks(1, killed_while_writing, str(tmp_path), fault, init_group=False, expect_dead=[0])
    there = rollout(trainer())
    subscriber = Subscriber(there, str(tmp_path / "versions"))
    subscriber.update()
    assert subscriber.version == 1
    assert state(there) == (tmp_path / "state").read_text()


def test_a_disk_that_is_full_at_a_relay_and_payloads_that_cannot_be_had() -> None:
    model = trainer()
    with pair(model, receivers=0) as (publisher, _, _):
        publisher.publish(0)
        feed = open_feed(publisher.url, None)
        there = rollout(model)
        subscriber = Subscriber(there, RelayFeed(feed))
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        for fault, kind in (("enospc", OSError), ("raise=boom", FaultError)):
            with points.armed(f"{fault}@rl.relay.fetch"), pytest.raises(kind):
                subscriber.update()
            assert bits(there) == old
        subscriber.update()
        assert same(model, there)
        feed.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_link_that_cuts_and_flips_at_random(seed: int) -> None:
    """Whatever goes wrong on the way, what is served is a version, and in the end the newest."""
    generator = torch.Generator().manual_seed(seed)
    model = trainer()
    states = {}
    with pair(model, receivers=0) as (publisher, _, _), link(publisher.url) as between:
        there = rollout(model)

        def bad(data: bytes) -> bytes:
            dice = float(torch.rand((), generator=generator))
            if dice < 0.04 and data:
                changed = bytearray(data)
                changed[int(dice * 1e6) % len(changed)] ^= 1 << seed
                return bytes(changed)
            return data[: len(data) // 2] if dice < 0.08 else data

        with Subscriber(there, between.url, timeout=2) as subscriber:
            for version in range(6):
                nudge(model, version)
                publisher.publish(version)
                states[version] = bits(model)
                between.forge = bad
                with contextlib.suppress(PlanariaError):
                    subscriber.update(at_least=version, timeout=1)
                if subscriber.version is not None:
                    assert bits(there) == states[subscriber.version]
            between.forge = lambda data: data
            between.cut()
            subscriber.update(at_least=5, timeout=60)
            assert same(model, there)


def forged(subscriber: Subscriber, token: bytes | None, **changes: object) -> None:
    """Has a subscriber offered a manifest with other contents, signed as if by the trainer."""
    chain = subscriber._feed.chain

    def offers(*args: object) -> list[Offer]:
        made = []
        for offer in chain(*args):  # type: ignore[arg-type]
            manifest = Manifest.verify(offer.manifest, subscriber._token)
            made.append(Offer(replace(manifest, **changes).sign(token), offer.read))  # type: ignore[arg-type]
        return made

    subscriber._feed.chain = offers  # type: ignore[method-assign]


HASH = "0" * 32


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"entries": (Entry(0, "dense", -1, 1 << 61, 1, HASH),)}, "asks for"),
        ({"entries": (Entry(0, "dense", -1, 8, 1 << 60, HASH),)}, "asks for"),
        ({"entries": (Entry(10**9, "dense", -1, 8, 1, HASH),)}, "block that its table lacks"),
        ({"entries": (Entry(0, "zip", -1, 8, 1, HASH),)}, "zip|not what its manifest"),
        ({"models": ((1 << 60, HASH),)}, "too large models"),
        ({"table": "0" * 64}, "no block table"),
        ({"digest": (HASH, HASH), "base_digest": (HASH, HASH)}, "other blocks"),
        ({"base_version": None, "base_digest": None, "entries": ()}, "lacks blocks"),
    ],
)
def test_a_manifest_that_asks_for_the_impossible(changes: dict, error: str) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        forged(subscriber, None, **changes)
        with pytest.raises(PlanariaError, match=error):
            # A table that is not there may be about to come: it is asked for until time is up.
            subscriber.update(timeout=5.0 if "table" in changes else None)
        assert bits(there) == old
        assert subscriber.version == 0


def test_a_manifest_with_a_wrong_signature() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        forged(subscriber, b"somebody else's token")
        with pytest.raises(WireError, match="signed"):
            subscriber.update()
        assert bits(there) == old


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-1],
        lambda d: d.replace(b'"shards":1', b'"shards":3'),
        lambda d: d.replace(b"bfloat16", b"float128", 1),
        lambda d: d.replace(b"[0,[0", b"[9,[0", 1),
        lambda d: b"[]",
    ],
)
def test_a_block_table_that_is_not_one(change: object) -> None:
    model = trainer()
    with pair(model) as (publisher, _, _):
        data = change(publisher.table.encoded)  # type: ignore[operator]
        with pytest.raises(FormatError, match="not the one"):
            BlockTable.decode(data, publisher.table.key)
        key = hashlib.sha256(data).hexdigest()
        with pytest.raises(FormatError, match="malformed"):
            BlockTable.decode(data, key)
        assert BlockTable.decode(publisher.table.encoded, publisher.table.key) == publisher.table


def test_an_acknowledgement_before_the_baseline_is_what_a_laggard_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sabotage: a publisher that forgets what was not acknowledged must send all again."""

    def laggard_gets_full() -> bool:
        model = trainer()
        with pair(model, receivers=2) as (publisher, (fast, slow), (_, there)):
            publisher.publish(0)
            fast.update()
            slow.update()
            for version in range(1, 8):
                nudge(model, version)
                publisher.publish(version)
                fast.update()
            report = slow.update()
            assert report is not None
            assert same(model, there)
            return report.full

    assert not laggard_gets_full()
    monkeypatch.setattr("planaria.rl_sync.versions.log.VersionLog.needed", lambda self: [10**9])
    assert laggard_gets_full()


def test_requests_that_are_nonsense_end_only_their_own_connection() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        host, port = publisher._outlets[0].address  # type: ignore[attr-defined]
        with wire.connect(host, port, deadline=Deadline(60), limits=rpc.LIMITS) as connection:
            for request in (
                {"op": "nope"}, {}, {"op": "chain"}, {"op": "chain", "have": [1], "shard": 0},
                {"op": "read", "offer": 5, "numbers": [0]}, {"op": "ack", "ack": {"worker": 3}},
                {"op": "hello", "relay": "http://x"}, {"op": "head", "after": "x"},
            ):  # fmt: skip
                with pytest.raises((SyncError, CorruptError)):
                    rpc.call(connection, request, deadline=Deadline(60), otherwise=SyncError)
        subscriber.update()
        assert same(model, there)
