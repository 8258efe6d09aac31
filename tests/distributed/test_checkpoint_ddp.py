"""DistributedDataParallel in its forms: saved on 2 ranks, restored on 2, 1 and 3."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainings import checkpointer, digest, whole_state

from planaria.checkpoint import mark_communication, open_checkpoint

SAVED_AT, STEPS = 2, 4


class Net(nn.Module):
    """Buffers that differ between ranks, and a use of each rank's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, 3] for [batch, 5]."""
        return self.head(self.drop(self.body(x)))


def _compiled(model: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def _compiled_in_place(model: Net) -> nn.Module:
    model.compile(backend="eager")
    return DistributedDataParallel(model)


def _recomputed(model: Net) -> nn.Module:
    model.body = checkpoint_wrapper(model.body)
    return DistributedDataParallel(model)


VARIANTS: dict[str, Callable[[Net], nn.Module]] = {
    "usual": DistributedDataParallel,
    "accumulating": DistributedDataParallel,
    "averaged": DistributedDataParallel,
    "static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "compiled inside": lambda m: DistributedDataParallel(_compiled(m)),
    "compiled outside": lambda m: _compiled(DistributedDataParallel(m), "aot_eager"),
    "compiled in place": _compiled_in_place,
    "recomputed": _recomputed,
}


@dataclass(frozen=True)
class Outcome:
    """State when saved or restored, and what came after it, on one rank."""

    state: dict[str, str]
    losses: list[float]
    final: dict[str, str]
    skipped: dict[str, str]


class Training:
    """One variant's model, optimizer, schedule and averages."""

    def __init__(self, variant: str, *, plain: bool = False) -> None:
        torch.manual_seed(3)
        net, self.variant = Net(), variant
        self.model: nn.Module = net if plain else VARIANTS[variant](net)
        # Each rank draws its own numbers from here on.
        torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
        self.optim = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optim, 1, gamma=0.7)
        self.state: dict[str, Any] = {
            "model": self.model, "optim": self.optim, "schedule": self.schedule,
        }  # fmt: skip
        if variant == "averaged":
            self.averaged = AveragedModel(
                net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
            )
            self.state["averaged"] = self.averaged

    def step(self) -> float:
        """Trains one step on numbers that come from the rank's own generator."""
        self.optim.zero_grad()
        micro_batches = 2 if self.variant == "accumulating" else 1
        total = 0.0
        for i in range(micro_batches):
            last = i + 1 == micro_batches
            no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else no_sync():
                loss = self.model(torch.randn(8, 5)).square().mean()
                loss.backward()
            total += loss.item()
        self.optim.step()
        self.schedule.step()
        if self.variant == "averaged":
            self.averaged.update_parameters(getattr(self.model, "module", self.model))
        return total

    def digests(self) -> dict[str, str]:
        """Everything that must come back, under the names it is stored under."""
        found = whole_state(self.model, self.optim)
        if self.variant == "averaged":
            averaged = whole_state(self.averaged)
            found |= {f"averaged.{n.removeprefix('model.')}": d for n, d in averaged.items()}
        return found


def train_and_save(rank: int, root: Path) -> dict[str, Outcome]:
    """Trains each variant without a break and saves on the way."""
    found = {}
    for variant in VARIANTS:
        training = Training(variant)
        with checkpointer(root / variant, training.state, every=SAVED_AT, keep=1) as ckpt:
            for step in range(SAVED_AT):
                training.step()
                ckpt.step(step + 1)
            state = training.digests()
            # Not saved, but it goes on while the save is under way.
            losses = [training.step() for _ in range(SAVED_AT, STEPS)]
        found[variant] = Outcome(state, losses, training.digests(), {})
    return found


def restore_and_train(rank: int, root: Path, plain: bool, fresh: str | None) -> dict[str, Outcome]:
    """Restores each variant, perhaps into the unwrapped model or into another variant."""
    found = {}
    for variant in VARIANTS:
        target = fresh if fresh and variant != "averaged" else variant
        training = Training(target, plain=plain)
        with checkpointer(root / variant, training.state) as ckpt:
            report = ckpt.restore()
            assert report is not None
            assert report.step == SAVED_AT
        state = training.digests()
        losses = [training.step() for _ in range(SAVED_AT, STEPS)]
        found[variant] = Outcome(state, losses, training.digests(), report.skipped)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Outcome]]]:
    """Every variant, trained without a break on 2 ranks."""
    root = tmp_path_factory.mktemp("ddp")
    return root, run_ranks(2, train_and_save, root, timeout=120)


Saved = tuple[Path, list[dict[str, Outcome]]]


def test_rank_0_is_the_one_whose_buffers_count(saved: Saved) -> None:
    root, outcomes = saved
    for variant in VARIANTS:
        of_0, of_1 = (outcomes[rank][variant].state for rank in (0, 1))
        differ = {name for name in of_0 if of_0[name] != of_1[name]}
        assert {"model.body.1.running_mean", "model.body.1.running_var"} <= differ
        checkpoint = open_checkpoint(root / variant)
        assert {name: digest(checkpoint.read(name)) for name in checkpoint.names()} == of_0
        assert checkpoint.verify() == []


def test_it_goes_on_as_if_it_had_never_stopped(saved: Saved) -> None:
    root, outcomes = saved
    restored = run_ranks(2, restore_and_train, root, False, None, timeout=120)
    for variant in VARIANTS:
        for rank in (0, 1):
            mine, uninterrupted = restored[rank][variant], outcomes[rank][variant]
            assert mine.state == outcomes[0][variant].state, variant
            assert mine.losses == uninterrupted.losses, variant
            # A buffer that no broadcast makes equal goes on from rank 0's on every rank.
            own = {name for name in mine.final if rank and name.startswith("averaged.body.1.run")}
            assert {n for n, d in mine.final.items() if d != uninterrupted.final[n]} <= own
            assert mine.skipped == {}


@pytest.mark.parametrize(("world", "plain"), [(1, True), (3, False)])
def test_on_another_number_of_ranks(saved: Saved, world: int, plain: bool) -> None:
    root, outcomes = saved
    restored = run_ranks(world, restore_and_train, root, plain, "usual", timeout=120)
    for variant in VARIANTS:
        for rank in range(world):
            assert restored[rank][variant].state == outcomes[0][variant].state
            # A rank that was not there has no random numbers to go on with, and is told so.
            assert list(restored[rank][variant].skipped) == (["rng"] if rank > 1 else [])
    if world == 1:
        return
    # Streams of their own: not the ones of another rank.
    losses = [restored[rank]["usual"].losses for rank in range(world)]
    assert losses[2] not in losses[:2]


def gradients_of(rank: int) -> list[dict[str, str]]:
    """Gradients over all ranks: of DDP as it is, of one that is marked, and with torch's hook."""
    found = []
    for marks, hook in ((False, None), (True, None), (True, allreduce_hook)):
        torch.manual_seed(3)
        model = DistributedDataParallel(Net(), find_unused_parameters=True)
        if marks:
            mark_communication(model, hook)
        torch.manual_seed(rank)
        model(torch.randn(8, 5)).square().mean().backward()
        found.append({n: digest(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    return found


def test_marked_gradients_have_the_same_bits() -> None:
    for plain, marked, divided in run_ranks(3, gradients_of):
        assert marked == plain
        assert divided != plain  # the test notices another mean
