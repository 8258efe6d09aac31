"""Training goes on while a save is captured: never a torn checkpoint, whoever writes when.

What changes through an optimizer waits at the gate. What is written behind its back (a fused
optimizer called past its hook, `.data`, numpy, a collective) makes the save fail, and is named.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import held
from fault_job import Job, differences, make_checkpointer, own_random, restored
from ranks import run_ranks

from planaria.checkpoint import Checkpointer, SaveHandle, points
from planaria.checkpoint.capture import gate
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import armed
from planaria.errors import SaveFailedError, TornCaptureError

Write = Callable[[Job], object]


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with own_random():
        yield


def fused_past_the_hook(job: Job) -> None:
    """A fused optimizer's step, as code calls it that has wrapped or compiled it by itself."""
    for parameter in job.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step: Any = type(job.optim).step
    step.__wrapped__(job.optim)


def a_fused_kernel(job: Job) -> None:
    parameter = job.model.first.weight
    slots = job.optim.state[parameter]
    with torch.no_grad():
        torch._fused_adamw_(
            [parameter],
            [torch.ones_like(parameter)],
            [slots["exp_avg"]],
            [slots["exp_avg_sq"]],
            [],
            [slots["step"].clone()],
            lr=0.1,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def through_data(job: Job) -> None:
    job.model.first.weight.data.mul_(1.5)


def through_numpy(job: Job) -> None:
    job.model.first.bias.detach().numpy()[3] += 1.0


def one_bit_of_a_slot(job: Job) -> None:
    slot = job.optim.state[job.model.second.weight]["exp_avg"]
    slot.view(torch.int16).numpy()[5, 7] ^= 1


def in_no_grad(job: Job) -> None:
    with torch.no_grad():
        job.model.second.bias.add_(1)


WRITES: dict[Write, str] = {
    fused_past_the_hook: "optim.first.weight.step",
    a_fused_kernel: "model.first.weight",
    through_data: "model.first.weight",
    through_numpy: "model.first.bias",
    one_bit_of_a_slot: "optim.second.weight.exp_avg",
    in_no_grad: "model.second.bias",
}


def check_caught(
    ckpt: Checkpointer, job: Job, write: Write, name: str, moment: str, step: int
) -> None:
    job.advance()
    with held(moment) as hold:
        handle = ckpt.save(step)
        hold.wait_reached()
        write(job)
        hold.go_on.set()
        changed = pytest.raises(SaveFailedError, match=f"{name}.* changed while being captured")
        with changed as info:
            handle.wait_committed()
    assert isinstance(info.value.__cause__, TornCaptureError)
    with pytest.raises(SaveFailedError, match="before_update"):
        ckpt.step(step)


@pytest.mark.parametrize("moment", [points.CAPTURE_BEGIN, points.CAPTURE_AUDIT])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_behind_the_gates_back(tmp_path: Path, write: Write, moment: str) -> None:
    job = Job(fused=True)
    with make_checkpointer(tmp_path / "root", job) as ckpt:
        job.advance()
        before = job.snapshot()
        ckpt.save(1).wait_committed()
        check_caught(ckpt, job, write, WRITES[write], moment, 2)
        assert Root(LocalStorage(tmp_path / "root")).steps() == [1]
        again = Job(fused=True)
        restored(tmp_path / "root", again)
        assert not differences(again.snapshot(), before)
        ckpt.save(3).wait_committed()  # told once, and then it goes on


def writes_by_collective(rank: int, path: str) -> list[int]:
    job = Job()
    job.advance()
    with make_checkpointer(path, job, timeout_s=60) as ckpt:
        ckpt.save(1).wait_committed()
        check_caught(ckpt, job, lambda job: dist.all_reduce(job.model.first.weight.data),
                     "model.first.weight", points.CAPTURE_AUDIT, 2)  # fmt: skip
        return ckpt.all_steps()


def test_a_collective_into_parameters(tmp_path: Path) -> None:
    assert run_ranks(2, writes_by_collective, str(tmp_path / "root")) == [[1], [1]]


def test_parameters_that_are_replaced_were_captured(tmp_path: Path) -> None:
    """New memory in the place of the old one tears nothing: the old one is what is saved."""
    job = Job()
    job.advance()
    before = job.snapshot()
    with (
        make_checkpointer(tmp_path / "root", job) as ckpt,
        held(points.CAPTURE_BEGIN) as hold,
    ):
        handle = ckpt.save(1)
        hold.wait_reached()
        job.model.first.weight.data = torch.zeros(1, 1)
        hold.go_on.set()
        handle.wait_committed()
    again = Job()
    restored(tmp_path / "root", again)
    assert not differences(again.snapshot(), before)


@pytest.mark.parametrize("write", WRITES)
def test_a_loop_with_unlucky_writes(tmp_path: Path, write: Write) -> None:
    """At whatever moment it falls: what is committed is what was there at the call."""
    job, saved = Job(fused=True), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with make_checkpointer(tmp_path / "root", job, on_failure="degrade") as ckpt:
            for step in range(1, 16):
                job.advance()
                saved[step] = job.snapshot()
                ckpt.step(step)
                handle = ckpt.save(step)
                time.sleep(0.0005 * (step % 8))
                write(job)
                handle.wait_captured()
    check_exact(tmp_path / "root", saved)


def check_exact(root: Path, saved: dict[int, Any]) -> int:
    """Each committed step holds what was there when it was saved; returns how many there are."""
    steps = Root(LocalStorage(root)).steps()
    for step in steps:
        again = Job(fused=True)
        restored(root, again, step)
        wrong = differences(again.snapshot(), saved[step])
        assert not wrong, f"step {step} is torn: {wrong}"
    return len(steps)


def steps_during_capture(root: Path, patience_s: float = 0.2) -> None:
    """The optimizer wants to go on before a byte is copied; the check that must notice a tear."""
    job, saved, stepped = Job(fused=True), {}, threading.Event()

    def wait_for_step(name: str, step: int | None) -> None:
        stepped.wait(patience_s)  # in vain while the gate is closed

    with (
        armed(callbacks={points.CAPTURE_BEGIN: wait_for_step}),
        make_checkpointer(root, job) as ckpt,
    ):
        for step in (1, 2, 3):
            job.advance()
            stepped.set()
            saved[step] = job.snapshot()
            ckpt.before_update()
            stepped.clear()
            ckpt.save(step)
        job.advance()
        stepped.set()
    assert check_exact(root, saved) == 3


def test_the_gate_holds_the_optimizer(tmp_path: Path) -> None:
    steps_during_capture(tmp_path / "root")


@pytest.mark.filterwarnings("ignore:step . was not committed")
def test_sabotage_gate_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the audit; and by the comparison of what was saved, where that is off, too."""
    monkeypatch.setattr(Checkpointer, "before_update", lambda self: None)
    with pytest.raises(SaveFailedError, match="changed while being captured"):
        steps_during_capture(tmp_path / "audited", 60)
    monkeypatch.setattr(Audit, "check", lambda self: None)
    with pytest.raises(AssertionError, match="is torn"):
        steps_during_capture(tmp_path / "blind", 60)


def test_a_step_before_the_save_needs_no_gate(tmp_path: Path) -> None:
    """The hook goes with the last checkpointer: an optimizer alone is as fast as ever."""
    job = Job()
    with make_checkpointer(tmp_path / "root", job):
        assert gate._hook is not None
    assert gate._hook is None
    job.advance()


def test_saves_that_overlap(tmp_path: Path) -> None:
    """Five are captured before the first is written: each still holds its own step."""
    job, saved = Job(fused=True), {}
    with (
        make_checkpointer(tmp_path / "root", job, every=1) as ckpt,
        held(points.WRITE_CHUNK) as hold,
    ):
        handles = [save_next(ckpt, job, saved) for _ in range(5)]
        ckpt.before_update()
        assert not any(h.committed for h in handles)
        hold.go_on.set()
    assert all(h.committed for h in handles)
    assert check_exact(tmp_path / "root", saved) == 5


def test_storage_that_is_slower_than_the_interval(tmp_path: Path) -> None:
    """A pool smaller than the state: training waits for the writing, and nothing is mixed up."""
    job, saved = Job(fused=True), {}
    with (
        armed(f"sleep=0.01@{points.WRITE_CHUNK}:times=inf"),
        make_checkpointer(tmp_path / "root", job, every=1, pool_bytes=2 * 4096) as ckpt,
    ):
        handles = [save_next(ckpt, job, saved) for _ in range(5)]
        assert ckpt._job.attached.pool.nbytes == 2 * 4096
    assert all(h.committed for h in handles)
    assert check_exact(tmp_path / "root", saved) == 5


def save_next(ckpt: Checkpointer, job: Job, saved: dict[int, Any]) -> SaveHandle:
    job.advance()
    step = len(saved) + 1
    saved[step] = job.snapshot()
    handle = ckpt.step(step)
    assert handle is not None
    return handle
