"""A rollout holds exactly the trainer's weights of one version, always."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from rl_models import bits, each_version, holds, nudge, pair, rollout, same, trainer

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    CorruptError,
    FaultError,
    SyncError,
    WireError,
)
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.transports.feed import Offer
from planaria.rl_sync.versions import staging
from planaria.rl_sync.versions.history import History
from planaria.rl_sync.versions.manifest import Manifest


@pytest.mark.parametrize("codec", ["auto", "dense", "bitmap", "gap_raw", "gap_ulp", "exponent"])
def test_every_version_arrives(codec: str) -> None:
    model = trainer()
    with pair(model, codec=codec) as (publisher, (subscriber,), (there,)):

        def check(version: int) -> None:
            report = subscriber.update(at_least=version)
            assert report is not None
            assert report.version == subscriber.version == version
            assert report.base_version == (version - 1 if version else None)
            assert report.full == (version == 0)
            assert same(model, there)
            assert subscriber.audit()
            assert subscriber.lag == 0
            if codec != "auto" and version:
                assert report.codec == codec

        each_version(model, publisher, 4, check)
        assert subscriber.update() is None


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_every_rollout_dtype(dtype: torch.dtype) -> None:
    model = trainer()
    with torch.no_grad():
        first = model.mlp[0].bias
        assert isinstance(first, torch.Tensor)
        first[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    with pair(model, dtype=dtype) as (publisher, (subscriber,), (there,)):
        each_version(model, publisher, 3, lambda version: subscriber.update(at_least=version))
        assert same(model, there, dtype)


def test_a_report_says_what_went_over() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), _):
        first = publisher.publish(0)
        assert (first.base_version, first.codec, first.changed) == (None, "dense", 0)
        assert first.bytes == first.dense_bytes
        subscriber.update()
        with torch.no_grad():
            model.norm.weight[:5] += 1
        second = publisher.publish(7)
        got = subscriber.update()
        assert got is not None
        assert second.changed == got.changed == 5
        assert second.base_version == got.base_version == 0
        assert second.bytes == got.bytes < second.dense_bytes == got.dense_bytes
        assert second.seconds >= second.scan_seconds > 0
        (row,) = publisher.workers()
        assert (row["worker"], row["version"], row["lag"]) == ("w0", 7, 0)
        assert row["nbytes"] == got.bytes


def test_nothing_changed_is_a_version_too() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        assert publisher.publish(1).changed == 0
        report = subscriber.update()
        assert report is not None
        assert (report.version, report.changed, report.codec) == (1, 0, "none")
        assert same(model, there)


def test_laggards_get_one_folded_delta_and_late_joiners_a_full_version() -> None:
    model = trainer()
    with pair(model, receivers=3) as (publisher, subscribers, models):
        fast, slow, late = subscribers
        publisher.publish(0)
        fast.update()
        slow.update()
        for version in range(1, 5):
            nudge(model, version)
            publisher.publish(version)
            fast.update()
        caught_up, joined = slow.update(), late.update()
        assert caught_up is not None
        assert joined is not None
        assert (caught_up.steps, caught_up.base_version, caught_up.full) == (1, 0, False)
        assert (joined.base_version, joined.full) == (None, True)
        assert all(same(model, m) for m in models)
        assert all(s.audit() for s in subscribers)


def test_a_short_gap_is_replayed() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        for version in (1, 2):
            nudge(model, version)
            publisher.publish(version)
        report = subscriber.update()
        assert report is not None
        assert (report.steps, report.version) == (2, 2)
        assert same(model, there)


def test_old_versions_are_kept_for_who_acknowledged_them_and_no_longer() -> None:
    model = trainer()
    with pair(model, receivers=2) as (publisher, (fast, slow), _):
        publisher.publish(0)
        fast.update()
        slow.update()
        for version in range(1, 12):
            nudge(model, version)
            publisher.publish(version)
            fast.update()
        assert 0 in publisher._owner.history.versions()  # slow's
        slow.update()
        publisher.publish(12)
        assert min(publisher._owner.history.versions()) >= 8


def test_what_is_forgotten_comes_in_full() -> None:
    model = trainer()
    with pair(model, history_bytes=1) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        for version in (1, 2, 3):
            nudge(model, version)
            publisher.publish(version)
        report = subscriber.update()
        assert report is not None
        assert report.full
        assert same(model, there)


def test_a_delta_that_was_dropped_is_made_again() -> None:
    model = trainer()
    with pair(model, receivers=6) as (publisher, subscribers, models):
        publisher._owner._keep, publisher._owner._cached_bytes = 1, 0
        publisher.publish(0)
        for subscriber in subscribers:
            subscriber.update()
        for version in range(1, 7):  # two each at versions 0, 1 and 2
            nudge(model, version, share=0.02)
            publisher.publish(version)
            for subscriber in subscribers[2 * version :]:
                if version < 3:
                    subscriber.update()
        for subscriber in (*subscribers[::2], *subscribers[1::2]):
            report = subscriber.update(timeout=30)
            assert report is not None
            assert (report.steps, report.full) == (1, False)
        assert all(same(model, m) for m in models)


@pytest.mark.parametrize("version", [-1, 1.5, "7", None, 1 << 62])
def test_what_is_no_version_is_refused_before_anybody_hears_of_it(version: Any) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        with pytest.raises(ConfigError, match="whole number"):
            publisher.publish(version)
        publisher.publish(np.int64(3))  # type: ignore[arg-type]
        subscriber.update()
        assert subscriber.version == 3
        assert same(model, there)


def test_versions_only_grow() -> None:
    model = trainer()
    with pair(model) as (publisher, _, _):
        publisher.publish(3)
        with pytest.raises(SyncError, match="not newer"):
            publisher.publish(3)
        publisher.publish(4)


def test_a_publish_that_fails_is_made_up_for_by_the_next() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        for place in ("rl.publish.scan", "rl.publish.commit"):
            with points.armed(f"raise=boom@{place}"), pytest.raises(FaultError):
                publisher.publish(1)
            assert subscriber.update() is None
        nudge(model, 2)
        publisher.publish(2)
        subscriber.update()
        assert same(model, there)


def test_changes_are_found_beside_the_next_forward() -> None:
    model = trainer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        held = threading.Event()
        with points.armed(callbacks={"rl.publish.scan": lambda *_: held.wait(30)}):
            nudge(model, 1)
            wanted = bits(model)
            result = publisher.publish_async(1)
            model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
            threading.Timer(0.2, held.set).start()
            optimizer.step()  # waits for the scan by itself
        assert bits(model) != wanted
        assert result.result(30).version == 1
        subscriber.update(at_least=1)
        assert bits(there) == wanted


def test_a_failed_first_publish_leaves_nothing() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        add, publisher.log.add = publisher.log.add, None  # type: ignore[union-attr, assignment]
        with pytest.raises(TypeError):
            publisher.publish(0)
        publisher.log.add = add  # type: ignore[union-attr]
        nudge(model, 1)
        assert publisher.publish(1).base_version is None
        subscriber.update()
        assert same(model, there)


@pytest.mark.parametrize("place", ["rl.stage.block", "rl.apply.block", "rl.apply.end"])
@pytest.mark.parametrize("hit", [1, 2])
def test_a_failure_leaves_the_old_version_whole(place: str, hit: int) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        spec = f"raise=boom@{place}:hit={1 if place == 'rl.apply.end' else hit}"
        with points.armed(spec), pytest.raises(FaultError):
            subscriber.update()
        assert holds(there, old)
        assert subscriber.version == 0
        assert subscriber.audit()
        subscriber.update()
        assert same(model, there)


def test_the_undo_log_is_what_does_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: without it the test above fails."""
    monkeypatch.setattr(staging, "undo", lambda *_: None)
    with pytest.raises(AssertionError):
        test_a_failure_leaves_the_old_version_whole("rl.apply.end", 1)


def damaged(subscriber: Subscriber, change: object) -> None:
    """Has every payload changed on its way to a subscriber."""
    chain = subscriber._feed.chain

    def forged(*args: object) -> list[Offer]:
        return [
            Offer(o.manifest, lambda n, d, o=o: [change(x) for x in o.read(n, d)])  # type: ignore[operator]
            for o in chain(*args)  # type: ignore[arg-type]
        ]

    subscriber._feed.chain = forged  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "grow"])
def test_a_payload_that_was_changed_is_refused(kind: str) -> None:
    change = {
        "flip": lambda x: bytes([x[0] ^ 1]) + x[1:],
        "cut": lambda x: x[:-1],
        "empty": lambda x: b"",
        "grow": lambda x: x + b"x",
    }[kind]
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        chain = subscriber._feed.chain
        damaged(subscriber, change)
        with pytest.raises(CorruptError, match="not what its manifest says"):
            subscriber.update()
        assert bits(there) == old
        subscriber._feed.chain = chain  # type: ignore[method-assign]
        subscriber.update()
        assert same(model, there)


def test_the_digest_catches_what_the_hashes_would_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage of the checksums: the digest is a check of its own."""
    model = trainer()
    with pair(model, codec="gap_raw") as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        real = staging._read

        def blind(step: staging.Step, numbers: list[int]) -> dict[int, bytes]:
            got = real(step, numbers)
            last = max(got)
            return got | {last: got[last][:-1] + bytes([got[last][-1] ^ 1])}

        monkeypatch.setattr(staging, "_read", blind)
        with pytest.raises(CorruptError, match="digest"):
            subscriber.update()
        assert bits(there) == old


def test_without_both_the_suite_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage of checksums and digests: wrong weights get through, and `same` sees it."""
    model = trainer()
    with pair(model, codec="gap_raw") as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        publisher.publish(1)
        monkeypatch.setattr(staging, "content_hash", lambda data: Anything())
        monkeypatch.setattr(staging, "str", lambda value: Anything(), raising=False)
        damaged(subscriber, lambda x: x[:-1] + bytes([x[-1] ^ 1]))
        subscriber.update()
        assert not same(model, there)
        assert subscriber.digest != publisher.log.newest.digest[0]  # type: ignore[union-attr]


class Anything:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_manifest_of_another_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainer()
    with Publisher(model, "tcp://127.0.0.1:0", b"the token of the job") as publisher:
        publisher.publish(0)
        there = rollout(model, torch.float32)
        old = bits(there)
        for token in (b"some other token....", None):
            with (
                Subscriber(there, publisher.url, token, timeout=60) as subscriber,
                pytest.raises(WireError, match="token"),
            ):
                subscriber.update()
        assert bits(there) == old
        with Subscriber(there, publisher.url, b"the token of the job") as subscriber:
            subscriber.update()
        assert same(model, there, torch.float32)


def test_other_weights_than_the_base_get_a_full_version() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        with torch.no_grad():
            next(iter(there.parameters()))[3] = 7  # behind the subscriber's back
        nudge(model, 1)
        publisher.publish(1)
        assert not subscriber.audit()
        assert subscriber.version is None
        report = subscriber.update()
        assert report is not None
        assert report.full
        assert same(model, there)


def test_a_wrong_base_is_refused_before_a_weight_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = trainer(), trainer(seed=5)
    with pair(model) as (a, (subscriber,), (there,)), pair(other) as (b, _, _):
        a.publish(0)
        b.publish(0)
        subscriber.update()
        old = bits(there)
        for m, p in ((model, a), (other, b)):
            nudge(m, 1)
            p.publish(1)
        assert b.log is not None
        offers = b.log.chain((0, b.log._digests[0][0]), 0, Deadline(60))
        subscriber._feed.chain = lambda *_: offers  # type: ignore[method-assign]
        with pytest.raises(CorruptError, match="other weights of version 0"):
            subscriber.update()
        assert bits(there) == old
        # Sabotage: without that check the digest still refuses it.
        monkeypatch.setattr("planaria.rl_sync.versions.staging.check_chain", lambda *_: None)
        with pytest.raises(CorruptError):
            subscriber.update()
        assert bits(there) == old


@pytest.mark.parametrize("order", ["dropped", "swapped", "repeated", "replayed"])
def test_chains_that_do_not_follow_are_refused(order: str) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        for version in (1, 2):
            nudge(model, version)
            publisher.publish(version)
        chain = subscriber._feed.chain
        offers = chain((0, str(subscriber.digest)), 0, Deadline(60))
        assert len(offers) == 2
        if order == "replayed":
            subscriber.update()
            nudge(model, 3)
            publisher.publish(3)
        old = bits(there)
        forged = {
            "dropped": offers[1:], "swapped": offers[::-1], "repeated": offers[:1] * 2,
            "replayed": offers,
        }[order]  # fmt: skip
        subscriber._feed.chain = lambda *_: forged  # type: ignore[method-assign]
        with pytest.raises(CorruptError, match="applies to version"):
            subscriber.update()
        assert bits(there) == old
        subscriber._feed.chain = chain  # type: ignore[method-assign]
        subscriber.update()
        assert same(model, there)


def test_history_gives_back_any_kept_version() -> None:
    import numpy as np

    from planaria.rl_sync.diff.scan import Scanner

    rng = np.random.default_rng(0)
    history, scanner = History(), Scanner()
    states = [rng.integers(0, 9, 300).astype(np.uint16)]
    history.begin(0, {4: states[0].copy()})
    for version in range(1, 6):
        now = states[-1].copy()
        now[rng.choice(300, 40)] = rng.integers(0, 9, 40)
        history.commit(version, {4: scanner.scan([now], history.newest(4))})
        states.append(now)
    for u in range(6):
        assert np.array_equal(history.at(4, u), states[u])
        for v in range(u, 6):
            changes = history.between(4, u, v)
            assert np.array_equal(changes.pos, np.flatnonzero(states[u] != states[v]))
            assert np.array_equal(changes.old, states[u][changes.pos])
            assert np.array_equal(changes.new, states[v][changes.pos])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-2],
        lambda d: d.replace(b'"version":1', b'"version":2'),
        lambda d: b"{}",
        lambda d: b"",
        lambda d: b'{"hmac":"' + b"0" * 64 + d[73:],
    ],
)
def test_a_changed_manifest_is_refused(change: object) -> None:
    made = Manifest(1, 0, ("0" * 32,), ("1" * 32,), "2" * 64, (), ())
    signed = made.sign(b"token")
    assert Manifest.verify(signed, b"token") == made
    with pytest.raises(WireError, match="signed"):
        Manifest.verify(change(signed), b"token")  # type: ignore[operator]


def test_the_suite_notices_when_signatures_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: with the comparison switched off a forged manifest gets through."""
    import hmac

    signed = Manifest(1, 0, ("0" * 32,), ("1" * 32,), "2" * 64, (), ()).sign(b"token")
    forged = signed.replace(b'"version":1', b'"version":2')
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: True)
    assert Manifest.verify(forged, b"token").version == 2
