"""One suite for every transport: whatever carries the versions, the same ones arrive."""

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_links import link
from rl_models import bits, each_version, nudge, pair, rollout, same, trainer

from planaria.core import points, wire
from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    DeadlineError,
    NotCommittedError,
    PlanariaError,
    SyncError,
    WireError,
)
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.transports import folder as folder_module
from planaria.rl_sync.transports.feed import Ack, Feed
from planaria.rl_sync.transports.relay import RelayFeed
from planaria.rl_sync.transports.tcp import TcpFeed, parse_address
from planaria.rl_sync.transports.urls import open_feed

TOKEN = b"the token of this test's job"

Open = Callable[[], Feed]
KINDS = ["log", "tcp", "relay", "folder", "shm", "memory"]


@contextmanager
def transport(
    kind: str, model: torch.nn.Module, tmp_path: Path
) -> Iterator[tuple[Publisher, Open]]:
    shared = f"test-{uuid.uuid4().hex}"  # of all of the machine's processes
    url = {
        "folder": str(tmp_path / "versions"), "shm": f"shm://{shared}",
        "memory": f"memory://{tmp_path.name}",
    }.get(kind, "tcp://127.0.0.1:0")  # fmt: skip
    with ExitStack() as stack:
        publisher = stack.enter_context(
            Publisher(model, url, TOKEN, dtype=torch.bfloat16, block_elements=1500, timeout=30)
        )
        if kind == "shm":
            stack.callback(shutil.rmtree, f"/dev/shm/planaria-{shared}")

        def opened() -> Feed:
            if kind == "log":
                assert publisher.log is not None
                return publisher.log
            feed = open_feed(publisher.url, TOKEN, worker="me")
            stack.callback(feed.close)
            return RelayFeed(feed) if kind == "relay" else feed

        yield publisher, opened


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_versions_arrive(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        there = rollout(model)
        subscriber = Subscriber(there, opened(), TOKEN)

        def check(version: int) -> None:
            report = subscriber.update(at_least=version)
            assert report is not None
            assert report.full == (version == 0)
            assert same(model, there)

        each_version(model, publisher, 4, check)
        assert subscriber.update() is None


def test_late_joiners_and_laggards(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        slow, late = rollout(model), rollout(model)
        one = Subscriber(slow, opened(), TOKEN, worker="one")
        publisher.publish(0)
        one.update()
        for version in range(1, 6):
            nudge(model, version)
            publisher.publish(version)
        for model_there, subscriber in ((slow, one), (late, Subscriber(late, opened(), TOKEN))):
            report = subscriber.update()
            assert report is not None
            assert report.version == 5
            assert same(model, model_there)


def test_nothing_there_is_none_in_time(kind: str, tmp_path: Path) -> None:
    with transport(kind, trainer(), tmp_path) as (_, opened):
        feed = opened()
        assert feed.head(None, Deadline(60), 0.1) is None
        assert feed.chain(None, 0, Deadline(60)) == []


def test_who_waits_for_a_version_gets_it(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        publisher.publish(0)
        feed = opened()
        timer = threading.Timer(0.2, publisher.publish, (1,))
        timer.start()
        head = feed.head(0, Deadline(60))
        timer.join()
        assert head is not None
        assert head.version == 1
        assert head.digest == publisher._digest


def test_acknowledgements_reach_the_publisher(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        publisher.publish(0)
        ack = Ack("some worker", 0, 0, "d" * 32, 12, 0.5, 1e6, "exponent")
        opened().acknowledge(ack, Deadline(60))
        nudge(model, 1)
        publisher.publish(1)
        (row,) = publisher.workers()
        assert {k: row[k] for k in ("worker", "version", "lag", "link", "codec")} == {
            "worker": "some worker", "version": 0, "lag": 1, "link": 1e6, "codec": "exponent"
        }  # fmt: skip


def test_strange_requests_are_refused(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        publisher.publish(0)
        feed = opened()
        with pytest.raises((PlanariaError, OSError)):
            feed.table("0" * 64, Deadline(60))
        (offer,) = feed.chain(None, 0, Deadline(60))
        for numbers in ([10**6], [-1]):
            with pytest.raises(PlanariaError):
                offer.read(numbers, Deadline(60))
        assert feed.chain((0, "0" * 32), 0, Deadline(60))  # another digest: a full one
        assert feed.chain((99, "0" * 32), 0, Deadline(60)) == []  # ahead of the publisher


def test_many_readers_at_once(kind: str, tmp_path: Path) -> None:
    model = trainer()
    with transport(kind, model, tmp_path) as (publisher, opened):
        publisher.publish(0)
        models = [rollout(model) for _ in range(4)]
        subscribers = [Subscriber(m, opened(), TOKEN, worker=f"w{i}") for i, m in enumerate(models)]

        def follow(subscriber: Subscriber) -> None:
            while subscriber.version != 4:
                subscriber.update(at_least=(subscriber.version or 0) + 1)

        threads = [threading.Thread(target=follow, args=(s,)) for s in subscribers]
        for thread in threads:
            thread.start()
        for version in range(1, 5):
            nudge(model, version)
            publisher.publish(version)
        for thread in threads:
            thread.join(60)
        assert [s.version for s in subscribers] == [4] * 4
        assert all(same(model, m) for m in models)


# TCP: reconnects, corruption, relays, pacing.


def test_a_lost_connection_is_made_again() -> None:
    model = trainer()
    with pair(model, receivers=0) as (publisher, _, _), link(publisher.url) as between:
        there = rollout(model)
        with Subscriber(there, between.url, timeout=30) as subscriber:
            for version in range(4):
                nudge(model, version)
                publisher.publish(version)
                between.cut()
                subscriber.update(at_least=version)
                assert same(model, there)
            assert isinstance(subscriber._feed, TcpFeed)
            assert subscriber._feed.reconnects >= 3


@pytest.mark.parametrize("at", [0, 40, 200, 2000])
def test_bits_flipped_on_the_way_never_arrive(at: int) -> None:
    model = trainer()
    with pair(model, receivers=0) as (publisher, _, _), link(publisher.url) as between:
        there = rollout(model)
        with Subscriber(there, between.url, timeout=60) as subscriber:
            publisher.publish(0)
            subscriber.update()
            old = bits(there)
            nudge(model, 1)
            publisher.publish(1)
            seen = 0

            def flip(data: bytes) -> bytes:
                nonlocal seen
                begin, seen = seen, seen + len(data)
                changed = bytearray(data)
                if begin <= at < seen:
                    changed[at - begin] ^= 4
                return bytes(changed)

            between.forge = flip
            subscriber.update()  # the connection breaks, and is made again
            assert bits(there) != old
            assert same(model, there)


def test_a_relay_sends_to_others_what_it_has_read_once() -> None:
    model = trainer()
    with ExitStack() as stack:
        publisher = stack.enter_context(
            Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, fan_out=2)
        )
        models = [rollout(model) for _ in range(16)]
        subscribers = [
            stack.enter_context(
                Subscriber(m, publisher.url, worker=f"w{i}", relay="tcp://127.0.0.1:0", timeout=60)
            )
            for i, m in enumerate(models)
        ]

        def all_follow(version: int) -> None:
            threads = [threading.Thread(target=s.update, args=(version,)) for s in subscribers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)

        publisher.publish(0)
        all_follow(0)
        before, relayed = publisher.sent_bytes, sum(s.relayed_bytes for s in subscribers)
        nudge(model, 1)
        report = publisher.publish(1)
        all_follow(1)
        assert all(same(model, m) for m in models)
        assert publisher.sent_bytes - before <= 2.1 * report.bytes
        assert sum(s.relayed_bytes for s in subscribers) - relayed >= 13 * report.bytes
        assert {row["version"] for row in publisher.workers()} == {1}
        assert len(publisher.workers()) == 16


def test_when_a_relay_goes_its_receivers_find_another_way() -> None:
    model = trainer()
    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, fan_out=1) as publisher:
        near, far = rollout(model), rollout(model)
        relay = Subscriber(near, publisher.url, relay="tcp://127.0.0.1:0", timeout=30)
        publisher.publish(0)
        relay.update()
        with Subscriber(far, publisher.url, timeout=30) as subscriber:
            subscriber.update()
            assert isinstance(subscriber._feed, TcpFeed)
            assert subscriber._feed.parent == relay.relay_url
            relay.close()
            nudge(model, 1)
            publisher.publish(1)
            subscriber.update(at_least=1)
            assert same(model, far)


def test_a_relay_cannot_change_what_it_passes_on() -> None:
    model = trainer()
    with pair(model, receivers=0) as (publisher, _, _):
        publisher.publish(0)
        feed = open_feed(publisher.url, None)
        relay = RelayFeed(feed)
        there = rollout(model)
        subscriber = Subscriber(there, relay)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        for offer in relay.chain((0, str(subscriber.digest)), 0, Deadline(60)):
            offer.read([0, 1], Deadline(60))
        for key, data in relay._payloads.items():
            relay._payloads[key] = bytes([data[0] ^ 1]) + data[1:]
        with pytest.raises(PlanariaError, match="not what its manifest says"):
            subscriber.update()
        assert bits(there) == old
        feed.close()


def test_a_relay_without_room_still_serves() -> None:
    model = trainer()
    with pair(model, receivers=0) as (publisher, _, _):
        publisher.publish(0)
        feed = open_feed(publisher.url, None)
        there = rollout(model)
        subscriber = Subscriber(there, RelayFeed(feed, max_bytes=1))
        subscriber.update()
        nudge(model, 1)
        publisher.publish(1)
        subscriber.update()
        assert same(model, there)
        feed.close()


def test_a_slow_receiver_holds_up_nobody() -> None:
    model = trainer()
    with pair(model) as (publisher, (fast,), (there,)), link(publisher.url) as between:
        stuck = threading.Event()
        freed = threading.Event()

        def hold(data: bytes) -> bytes:
            if between.carried > 3_000:
                stuck.set()
                freed.wait(60)
            return data

        slow_model = rollout(model)
        with Subscriber(slow_model, between.url, timeout=60) as slow:
            publisher.publish(0)
            between.forge = hold
            thread = threading.Thread(target=slow.update)
            thread.start()
            assert stuck.wait(30)
            for version in range(1, 4):
                nudge(model, version)
                publisher.publish(version)
                fast.update(at_least=version)
                assert same(model, there)
            between.forge = lambda data: data
            freed.set()
            thread.join(60)
            slow.update(at_least=3)
            assert same(model, slow_model)


def test_publishing_can_wait_for_receivers() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), _):
        assert publisher.publish(0, wait_for=1, timeout=0.2).acknowledged == 0
        thread = threading.Thread(target=subscriber.update, args=(1,))
        thread.start()
        assert publisher.publish(1, wait_for=1).acknowledged == 1
        thread.join()


def test_nobody_there_is_an_error_in_time() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), _):
        publisher.publish(0)
        publisher.close()
        with pytest.raises((WireError, DeadlineError)):
            subscriber.update(timeout=0.5)


def test_a_feed_that_is_closed_while_it_connects_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pair(trainer(), receivers=0) as (publisher, _, _):
        host, port = parse_address(publisher.url)
        feed, connect = TcpFeed(host, port), wire.connect
        made: list[Connection] = []

        def closed_meanwhile(*args: Any, **kwargs: Any) -> Connection:
            made.append(connect(*args, **kwargs))
            feed.close()
            return made[-1]

        monkeypatch.setattr(wire, "connect", closed_meanwhile)
        with pytest.raises(WireError, match="this feed was closed"):
            feed.head(None, Deadline(60), 0.0)
        with pytest.raises(WireError, match="closed on this side"):
            made[0].recv(Deadline(60))


def test_addresses() -> None:
    assert parse_address("tcp://[::1]:70") == ("::1", 70)
    for wrong in ("tcp://host", "http://host:1", "tcp://:1", "tcp://h:x"):
        with pytest.raises(WireError, match="tcp://host:port"):
            parse_address(wrong)
    with pytest.raises(ConfigError):
        Subscriber(trainer(), "tcp://host")


# Folders.


def test_a_version_folder_can_be_copied_elsewhere(tmp_path: Path) -> None:
    model = trainer()
    with transport("folder", model, tmp_path) as (publisher, _):
        each_version(model, publisher, 3, lambda _: None)
    shutil.copytree(tmp_path / "versions", tmp_path / "elsewhere")
    there = rollout(model)
    report = Subscriber(there, str(tmp_path / "elsewhere"), TOKEN).update()
    assert report is not None
    assert (report.version, report.steps) == (2, 3)
    assert same(model, there)


@pytest.mark.parametrize("place", ["rl.folder.write", "rl.folder.commit"])
def test_a_full_disk_is_reported_and_made_up_for(place: str, tmp_path: Path) -> None:
    model = trainer()
    with transport("folder", model, tmp_path) as (publisher, opened):
        publisher.publish(0)
        there = rollout(model)
        subscriber = Subscriber(there, opened(), TOKEN)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        with points.armed(f"enospc@{place}"), pytest.raises(SyncError, match="No space left"):
            publisher.publish(1)
        assert subscriber.update() is None
        assert bits(there) == old
        nudge(model, 2)
        publisher.publish(2)
        subscriber.update(at_least=2)
        assert same(model, there)


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    model = trainer()
    with transport("folder", model, tmp_path) as (publisher, opened):
        each_version(model, publisher, 2, lambda _: None)
        (tmp_path / "versions" / "weight_v000000001" / "manifest.json").unlink()
        head = opened().head(None, Deadline(60))
        assert head is not None
        assert head.version == 0
    with Publisher(model, str(tmp_path / "versions"), TOKEN) as publisher:
        assert not (tmp_path / "versions" / "weight_v000000001").exists()


def test_old_deltas_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainer()
    with transport("folder", model, tmp_path) as (publisher, opened):
        publisher._outlets[0]._full_every = 3  # type: ignore[attr-defined]
        there = rollout(model)
        subscriber = Subscriber(there, opened(), TOKEN)
        each_version(model, publisher, 9, lambda v: subscriber.update(at_least=v))
        assert same(model, there)
        names = sorted(p.name for p in (tmp_path / "versions").glob("weight_*"))
        assert names[0] >= "weight_v000000003"
        late = rollout(model)
        Subscriber(late, opened(), TOKEN).update()
        assert same(model, late)


def test_a_restarted_publisher_goes_on_in_its_folder(tmp_path: Path) -> None:
    model = trainer()
    there = rollout(model)
    url = str(tmp_path / "versions")
    with Publisher(model, url, TOKEN, dtype=torch.bfloat16) as publisher:
        each_version(model, publisher, 3, lambda _: None)
        state = publisher.state_dict()
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        subscriber = Subscriber(there, url, TOKEN)
        subscriber.update()
        nudge(model, 3)
        publisher.publish(3)  # after the checkpoint: this one is lost
        table = tmp_path / "versions" / "tables" / f"{publisher.table.key}.json"
    table.write_bytes(b"{}")  # damaged meanwhile
    model.load_state_dict(kept)
    with Publisher(model, url, TOKEN, dtype=torch.bfloat16) as publisher:
        publisher.load_state_dict(state)
        assert not (tmp_path / "versions" / "weight_v000000003").exists()
        nudge(model, 33)
        publisher.publish(3)
        report = subscriber.update(at_least=3)
        assert report is not None
        assert not report.full
        assert same(model, there)
        late = rollout(model)
        Subscriber(late, url, TOKEN).update()
        assert same(model, late)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be used|File exists"):
        Publisher(trainer(), str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="shared memory"):
        Subscriber(trainer(), "shm://../x")


def test_a_folder_without_its_full_version_says_so(tmp_path: Path) -> None:
    model = trainer()
    with transport("folder", model, tmp_path) as (publisher, opened):
        each_version(model, publisher, 2, lambda _: None)
        shutil.rmtree(tmp_path / "versions" / "weight_v000000000.full")
        with pytest.raises(NotCommittedError, match="no full version"):
            opened().chain(None, 0, Deadline(60))
    assert folder_module.FULL_EVERY > 1
