"""What is said to be served is what is there: odd moments at which an update can be disturbed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from rl_models import bits, nudge, pair, rollout, same, trainer
from torch import nn

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError, StaleError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.gate import VersionGate
from planaria.rl_sync.transports import tcp
from planaria.rl_sync.transports.feed import Ack
from planaria.rl_sync.versions import ahead as ahead_module
from planaria.rl_sync.versions import log as log_module
from planaria.rl_sync.versions import staging


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_the_weights_are_put_back_leaves_no_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        publisher.publish(1)
        with monkeypatch.context() as patch:
            patch.setattr(staging, "undo", interrupt)
            with (
                points.armed(callbacks={"rl.apply.end": interrupt}),
                pytest.raises(KeyboardInterrupt),
            ):
                subscriber.update()
        assert subscriber.version is None
        with pytest.raises(StaleError), subscriber.serving():
            pass
        report = subscriber.update()
        assert report is not None
        assert report.full
        assert same(model, there)


def test_an_interrupt_once_all_is_written_leaves_the_new_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        publisher.publish(1)
        apply = staging.apply

        def interrupted(*args: Any) -> None:
            apply(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(staging, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            subscriber.update()
        assert same(model, there)
        assert subscriber.version == 1
        assert subscriber.audit()


def test_two_threads_that_update_take_turns() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        nudge(model, 1)
        publisher.publish(1)
        staged, go_on = threading.Event(), threading.Event()

        def hold(*_: Any) -> None:
            staged.set()
            assert go_on.wait(60)

        with ThreadPoolExecutor(1) as pool, points.armed(callbacks={"rl.apply.end": hold}):
            first = pool.submit(subscriber.update)
            assert staged.wait(60)
            nudge(model, 2)
            publisher.publish(2)
            with pytest.raises(DeadlineError, match="another thread's update"):
                subscriber.update(timeout=0.1)
            go_on.set()
            assert first.result(60) is not None
        subscriber.update()
        assert same(model, there)
        assert subscriber.audit()


def test_a_forward_that_could_not_enter_does_not_open_the_gate() -> None:
    gate, module = VersionGate(), nn.Linear(2, 2)
    undo = gate.guard(module, 0.05)
    entered, leave = threading.Event(), threading.Event()

    def swap() -> None:
        with gate.swapping(Deadline(60)):
            entered.set()
            assert leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        assert entered.wait(60)
        with pytest.raises(DeadlineError):
            module(torch.zeros(2))
        leave.set()
        swapping.result(60)
    undo()
    held = gate.guard(module, 60)

    def inside(*_: Any) -> None:
        with pytest.raises(DeadlineError), ThreadPoolExecutor(1) as pool:
            pool.submit(try_swap).result(60)

    def try_swap() -> None:
        with gate.swapping(Deadline(0.05)):
            pass

    module.register_forward_pre_hook(inside)
    module(torch.zeros(2))
    held()


def test_a_relay_that_comes_again_is_not_sent_to_itself() -> None:
    model = trainer()
    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, fan_out=1) as publisher:
        publisher.publish(0)
        there = rollout(model)
        with Subscriber(there, publisher.url, relay="tcp://127.0.0.1:0", timeout=60) as relay:
            relay.update()
            feed = relay._feed._source.source  # type: ignore[attr-defined]
            # The connection is lost, and the publisher has not noticed.
            feed._connection = None
            nudge(model, 1)
            publisher.publish(1)
            relay.update(at_least=1)
            assert feed.parent == publisher.url
            assert bits(there) == bits(model)


def test_a_relay_on_all_addresses_is_found_where_it_came_from() -> None:
    assert tcp._reachable("tcp://0.0.0.0:70", "10.1.2.3:5555") == "tcp://10.1.2.3:70"
    assert tcp._reachable("tcp://[::]:70", "[fe80::1]:5555") == "tcp://[fe80::1]:70"
    assert tcp._reachable("tcp://10.9.9.9:70", "10.1.2.3:5555") == "tcp://10.9.9.9:70"


@pytest.mark.parametrize("by", ["a stranger", "another subscriber"])
def test_weights_that_something_else_has_written_to_are_taken_in_full(
    by: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        with Subscriber(there, publisher.url, worker="other", timeout=60.0) as other:
            publisher.publish(0)
            subscriber.update()
            other.update()
            nudge(model, 1)
            publisher.publish(1)
            if by == "a stranger":
                with torch.no_grad():
                    next(there.parameters()).add_(1)
            else:
                other.update()
            report = subscriber.update()
        assert report is not None
        assert report.full
        assert same(model, there)
        assert "something else has written" in caplog.text
        nudge(model, 2)
        publisher.publish(2)
        report = subscriber.update()
        assert report is not None
        assert not report.full
        assert same(model, there)


def test_receivers_that_are_gone_are_forgotten() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), _):
        publisher.publish(0)
        subscriber.update()
        log = publisher.log
        assert log is not None
        assert log.learnt().here == 1
        log.workers["w0"].at -= log_module.SILENT_S
        assert log.learnt().here == 0
        log.workers["w0"].at -= log_module.FORGOTTEN_S
        log.acknowledge(Ack("w1", 0, 0, ""), Deadline(1.0))
        assert [row["worker"] for row in publisher.workers()] == ["w1"]


def test_a_relay_that_is_stopped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainer()
    stopped, freed = threading.Event(), threading.Event()
    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, fan_out=1) as publisher:
        near, far = rollout(model), rollout(model)
        with (
            Subscriber(near, publisher.url, relay="tcp://127.0.0.1:0", timeout=60) as relay,
            Subscriber(far, publisher.url, timeout=600) as subscriber,
        ):
            publisher.publish(0)
            relay.update()
            subscriber.update()
            assert isinstance(subscriber._feed, tcp.TcpFeed)
            assert subscriber._feed.parent == relay.relay_url

            def frozen(*_: Any) -> None:
                stopped.set()
                freed.wait(60)
                raise StaleError("it goes on too late")

            for name in ("ahead", "head", "chain"):
                monkeypatch.setattr(relay._feed, name, frozen)
            # Only now: one that is merely slow must not be taken for stopped.
            for module, name in (
                (tcp, "_PATIENCE_S"),
                (tcp, "_FETCHING_S"),
                (ahead_module, "_WAIT_S"),
            ):
                monkeypatch.setattr(module, name, 0.2)
            nudge(model, 1)
            publisher.publish(1)
            try:
                subscriber.update(at_least=1, timeout=50)
                assert stopped.is_set()
                assert same(model, far)
                assert subscriber._feed.parent == publisher.url
            finally:
                freed.set()
