"""Versions by torch.distributed: a trainer broadcasts to the rollouts of its own job."""

import os
import signal

import torch
import torch.distributed as dist
from ranks import run_ranks
from rl_models import nudge, rollout, same, trainer

from planaria.core import points
from planaria.errors import FaultError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.transports.collective import GroupFeed, GroupOutlet


def job(rank: int, versions: int, failing: int) -> list:
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    model = trainer()
    said = []
    if rank == 0:
        with Publisher(model, [], dtype=torch.bfloat16, process_group=alone) as publisher:
            assert publisher.log is not None
            publisher.attach(GroupOutlet(publisher.log))
            for version in range(versions):
                nudge(model, version)
                publisher.publish(version)
                said.append({row["worker"]: row["version"] for row in publisher.workers()})
        return said
    there = rollout(model)
    subscriber = Subscriber(there, GroupFeed())
    for version in range(versions):
        nudge(model, version)  # as rank 0 does, to compare
        with points.armed(f"raise=boom@rl.apply.end:rank={rank},step={failing}"):
            try:
                report = subscriber.update(at_least=version)
            except FaultError:
                continue
        assert report is not None
        said.append((report.version, report.full, report.steps))
        assert same(model, there)
    return said


def test_broadcast_in_step() -> None:
    sent, *received = run_ranks(3, job, 3, 999, timeout=60)
    assert received == [[(0, True, 1), (1, False, 1), (2, False, 1)]] * 2
    assert sent == [{}, {"rank-1": 0, "rank-2": 0}, {"rank-1": 1, "rank-2": 1}]


def test_who_failed_gets_what_it_missed_in_the_next_round() -> None:
    _, one, two = run_ranks(3, job, 4, 1, timeout=60)
    assert one == two == [(0, True, 1), (2, False, 2), (3, False, 1)]


def dying(rank: int) -> str:
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = trainer()
    if rank == 1:
        subscriber = Subscriber(rollout(model), GroupFeed())
        subscriber.update(at_least=0)
        os.kill(os.getpid(), signal.SIGKILL)
    with Publisher(model, [], dtype=torch.bfloat16, process_group=alone) as publisher:
        assert publisher.log is not None
        publisher.attach(GroupOutlet(publisher.log))
        publisher.publish(0)
        try:
            publisher.publish(1)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_receiver_that_dies_is_an_error_at_the_trainer() -> None:
    results = run_ranks(2, dying, timeout=60, expect_dead=[1])
    assert results[0].startswith("SyncError")
    assert "another rank has probably died" in results[0]
