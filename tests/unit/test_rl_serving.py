"""What a rollout serves and when that changes: staleness, boundaries, restarts, misfits."""

import copy
import threading

import pytest
import torch
from rl_models import Tied, bits, nudge, pair, rollout, same, trainer
from torch import nn

from planaria.checkpoint import Checkpointer
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    DeadlineError,
    MismatchError,
    NotSupportedError,
    StaleError,
)
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.gate import VersionGate


def test_at_least_waits_and_gives_up() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        # Over TCP the time may be up before the answer is there.
        with pytest.raises((StaleError, DeadlineError)):
            subscriber.update(at_least=1, timeout=0.3)
        assert publisher.log is not None
        with pytest.raises(StaleError, match="version 1 was not published"):
            Subscriber(there, publisher.log).update(at_least=1, timeout=0.1)
        publisher.publish(0)
        timer = threading.Timer(0.2, publisher.publish, (1,))
        timer.start()
        report = subscriber.update(at_least=1)
        timer.join()
        assert report is not None
        assert report.version == 1
        assert same(model, there)


def test_max_staleness() -> None:
    model = trainer()
    with pair(model, subscriber={"max_staleness": 1}) as (publisher, (subscriber,), _):
        with pytest.raises(StaleError, match="no version"), subscriber.serving():
            pass
        publisher.publish(0)
        subscriber.update()
        for version in (1, 2):
            nudge(model, version)
            publisher.publish(version)
            assert subscriber.poll() == version
            if version == 1:
                with subscriber.serving() as stamp:
                    assert stamp == 0
        with pytest.raises(StaleError, match="2 behind"), subscriber.serving():
            pass
        subscriber.update()
        with subscriber.serving() as stamp:
            assert stamp == 2


def torn_forwards(guarded: bool) -> int:
    """How many of some forwards saw weights of two versions, when updates run beside them."""

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

        def forward(self) -> bool:
            first = self.a[0].item()
            reached.set()
            swapped.wait(0.3 if guarded else 60)  # in vain while the gate is closed
            return first == self.b[0].item()

    reached, swapped = threading.Event(), threading.Event()
    model, there = Slow(), Slow()
    torn = 0
    with (
        Publisher(model, "tcp://127.0.0.1:0") as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        publisher.publish(0)
        subscriber.update()
        if guarded:
            subscriber.guard()
        for version in (1, 2):
            with torch.no_grad():
                for p in model.parameters():
                    p += 1
            publisher.publish(version)
            reached.clear()
            swapped.clear()

            def swap() -> None:
                assert reached.wait(60)
                subscriber.update()
                swapped.set()

            thread = threading.Thread(target=swap)
            thread.start()
            torn += not there()
            thread.join()
    return torn


def test_no_forward_sees_two_versions() -> None:
    assert torn_forwards(guarded=True) == 0


def test_without_the_boundary_one_does() -> None:
    """Sabotage: the test above would notice."""
    assert torn_forwards(guarded=False) > 0


def test_a_gate_within_a_gate_and_a_swap_that_waits() -> None:
    gate = VersionGate()
    with gate.serving(Deadline(60)):
        started = threading.Event()

        def swap() -> None:
            started.set()
            with gate.swapping(Deadline(60)):
                pass

        thread = threading.Thread(target=swap)
        thread.start()
        assert started.wait(60)
        with gate.serving(Deadline(60)):  # a token within a request: no deadlock with the swap
            pass
        own = pytest.raises(DeadlineError, match=r"this thread's own forward|forwards")
        with own, gate.swapping(Deadline(0.1)):
            pass
    thread.join(60)
    assert not thread.is_alive()


def test_a_swap_that_gets_no_turn_changes_nothing() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        old = bits(there)
        nudge(model, 1)
        publisher.publish(1)
        failed: list[BaseException] = []

        def swap() -> None:
            try:
                subscriber.update(timeout=0.5)
            except DeadlineError as error:
                failed.append(error)

        with subscriber.serving():
            thread = threading.Thread(target=swap)
            thread.start()
            thread.join()
        assert failed
        assert bits(there) == old
        assert subscriber.version == 0


def test_a_publisher_resumes_its_chain_from_a_checkpoint(tmp_path: object) -> None:
    model = trainer()
    port = 0
    there = rollout(model)
    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16) as publisher:
        url = publisher.url
        port = int(url.rpartition(":")[2])
        with Checkpointer(str(tmp_path), {"model": model, "sync": publisher}) as saver:
            subscriber = Subscriber(there, url)
            publisher.publish(10)
            subscriber.update()
            saver.save(10).wait_committed()
    again = trainer(seed=9)
    with Publisher(again, f"tcp://127.0.0.1:{port}", dtype=torch.bfloat16) as publisher:
        with Checkpointer(str(tmp_path), {"model": again, "sync": publisher}) as saver:
            saver.restore()
        assert publisher.version == 10
        assert subscriber.update() is None
        nudge(again, 11)
        publisher.publish(11)
        report = subscriber.update(at_least=11)
        assert report is not None
        assert (report.base_version, report.full) == (10, False)
        assert same(again, there)
        subscriber.close()


def test_weights_that_are_not_the_version_are_not_taken_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        subscriber.update()
        state = publisher.state_dict()
        nudge(model, 1)
        publisher.load_state_dict(state)
        assert "in full" in caplog.text
        assert publisher.publish(1).base_version is None
        report = subscriber.update()
        assert report is not None
        assert report.full
        assert same(model, there)


def test_a_rewound_trainer_does_not_take_rollouts_back() -> None:
    model = trainer()
    with pair(model) as (publisher, (subscriber,), (there,)):
        publisher.publish(5)
        subscriber.update()
        old = bits(there)
        other = copy.deepcopy(model)
        nudge(other, 3)
        with Publisher(other, "tcp://127.0.0.1:0", dtype=torch.bfloat16) as rewound:
            rewound.publish(3)
            moved = Subscriber(there, rewound.url)
            moved._version, moved._digest = subscriber._version, subscriber._digest
            moved._tensors = subscriber._tensors
            assert moved.update() is None
            assert bits(there) == old
            nudge(other, 6)
            rewound.publish(6)
            report = moved.update()
            assert report is not None
            assert report.full
            assert same(other, there)
            moved.close()


@pytest.mark.parametrize("kind", ["name", "missing", "shape", "dtype"])
def test_models_that_do_not_fit_are_refused_untouched(kind: str) -> None:
    model = trainer()
    there = rollout(model)
    assert isinstance(there, Tied)
    if kind == "name":
        there.other = nn.Linear(2, 2).to(torch.bfloat16)
    elif kind == "missing":
        del there.norm
    elif kind == "shape":
        there.norm = nn.LayerNorm(5).to(torch.bfloat16)
    else:
        there.norm.float()
    old = bits(there)
    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16) as publisher:
        publisher.publish(0)
        with Subscriber(there, publisher.url) as subscriber:
            with pytest.raises(MismatchError, match=r"norm|other"):
                subscriber.update()
            assert subscriber.version is None
    assert bits(there) == old


def test_only_leaves_out() -> None:
    model = trainer()
    there = rollout(model)
    there.extra = nn.Linear(2, 2)

    def without(name: str) -> bool:
        return "norm" not in name and "extra" not in name

    with Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, only=without) as publisher:
        publisher.publish(0)
        with Subscriber(there, publisher.url, only=without) as subscriber:
            subscriber.update()
    assert isinstance(there, Tied)
    assert torch.equal(there.norm.weight, torch.full((32,), 0.5, dtype=torch.bfloat16))
    assert torch.equal(there.embed.weight, model.embed.weight.bfloat16())


def test_dtypes_that_cannot_be_sent_are_named() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(NotSupportedError, match="num_batches_tracked"):
        Publisher(model, "tcp://127.0.0.1:0")


def test_arguments_are_checked() -> None:
    model = trainer()
    with pytest.raises(ConfigError, match="token"):
        Publisher(model, "tcp://0.0.0.0:0")
    with pytest.raises(ConfigError, match="codec"):
        Publisher(model, "tcp://127.0.0.1:0", codec="zip")
    with pytest.raises(ConfigError, match="max_staleness"):
        Subscriber(model, "tcp://127.0.0.1:1", max_staleness=-1)
