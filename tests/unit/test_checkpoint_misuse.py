"""Wrong arguments, wrong processes, memory that goes away: one clear error, and nothing held up."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bits, held
from torch import nn

from planaria.checkpoint import Checkpointer, open_checkpoint, points
from planaria.checkpoint.storage.base import open_storage
from planaria.errors import ConfigError, SaveFailedError, StateError


class Anything:
    """A provider of one's own that hands out whatever it is told to."""

    key = "p"

    def __init__(self) -> None:
        self.value: Any = 1

    def collect(self, out: Any) -> None:
        """See `Provider.collect`."""
        out.object("p", self.value)

    def load(self, plan: Any) -> None:
        """See `Provider.load`."""
        self.value = plan.object("p")


@pytest.mark.parametrize(
    "bad", [{1, 2}, 10**5000, float("nan"), object()], ids=["set", "long", "nan", "object"]
)
def test_an_object_that_cannot_be_stored_costs_its_own_save_only(tmp_path: Path, bad: Any) -> None:
    provider = Anything()
    with Checkpointer(tmp_path, {"p": provider}) as ckpt:
        provider.value = bad
        with pytest.raises(SaveFailedError, match="'p' is not JSON data"):
            ckpt.save(1).wait_committed()
        provider.value = 2
        with pytest.raises(SaveFailedError, match="step 1 was not"):
            ckpt.save(2)
        ckpt.save(3).wait_committed()
        assert ckpt.all_steps() == [2, 3]


@pytest.mark.parametrize("step", ["3", None, -1, 1.0, True])
def test_a_step_that_is_no_number_of_steps(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path, {"x": {"a": 1}}) as ckpt:
        for call in (ckpt.step, ckpt.save):
            with pytest.raises(ConfigError, match="give the number of steps done"):
                call(step)
        if step is not None:
            with pytest.raises(ConfigError, match="give the number of steps done"):
                ckpt.restore(step)


@pytest.mark.parametrize("timeout", [-1, 0, "5", True])
def test_a_timeout_that_is_none_does_not_keep_the_root(tmp_path: Path, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout_s="):
        Checkpointer(tmp_path, {"x": {"a": 1}}, timeout_s=timeout)
    Checkpointer(tmp_path, {"x": {"a": 1}}).close()


@pytest.mark.parametrize("path", ["", None, b"bytes", 7, "nul\0byte"])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(ConfigError, match="give the name of a folder"):
        open_storage(path)


def test_a_pool_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pool_bytes='a'"):
        Checkpointer(tmp_path, {"x": {"a": 1}}, pool_bytes="a")  # type: ignore[arg-type]


def test_a_fork_cannot_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": {"a": 1}}) as ckpt:
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (ckpt.save, ckpt.step, ckpt.restore):
                try:
                    call(1)
                except ConfigError as error:
                    refused += "is a fork" in str(error)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        ckpt.save(1).wait_committed()


@pytest.mark.parametrize("moment", [points.CAPTURE_BEGIN, points.CAPTURE_AUDIT])
@pytest.mark.parametrize("audit", [False, True])
def test_memory_that_is_freed_while_it_is_captured(
    tmp_path: Path, moment: str, audit: bool
) -> None:
    """Such as by FSDP1-like code that shrinks storages: reading it would end the process."""
    model = nn.Linear(512, 512)
    with Checkpointer(tmp_path, {"model": model}, audit=audit) as ckpt:
        with held(moment) as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            model.weight.data.untyped_storage().resize_(0)
        with pytest.raises(SaveFailedError, match=r"model\.weight (was freed|changed)"):
            handle.wait_committed()
        model.weight.data = torch.ones(512, 512)
        with pytest.raises(SaveFailedError, match="was not committed"):
            ckpt.save(2)
        ckpt.save(3).wait_committed()
    assert open_checkpoint(tmp_path).verify() == []


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_weight_that_is_written_in_forward_is_copied_at_the_call(
    tmp_path: Path, kind: Any
) -> None:
    model = kind(8, 4, max_norm=0.1)
    before = bits(model.weight)
    with Checkpointer(tmp_path, {"model": model}, audit=True) as ckpt:
        with held(points.CAPTURE_BEGIN) as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            model(torch.arange(8).reshape(1, 8))
        handle.wait_committed()
    assert bits(model.weight) != before
    assert bits(open_checkpoint(tmp_path).read("model.weight")) == before


def test_inference_tensors_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with torch.inference_mode():
        made = torch.zeros(3)
    with Checkpointer(tmp_path, {"x": {"a": torch.ones(3), "b": made}}) as ckpt:
        ckpt.save(1).wait_committed()
        with pytest.raises(StateError, match=r"x\.b.*inference_mode"):
            ckpt.restore()


def test_tensors_seen_before_are_looked_at_again_where_they_changed(tmp_path: Path) -> None:
    """What is remembered of a tensor from one save to the next must not outlive a change."""
    model = nn.Linear(6, 6, bias=False)
    changes: list[Any] = [
        lambda: setattr(model.weight, "data", model.weight.data.t()),  # same memory, other strides
        lambda: setattr(model.weight, "data", torch.randn(3, 4)),
        lambda: setattr(model, "weight", nn.Parameter(torch.randn(6, 6))),
        lambda: model.to(torch.float64),
        lambda: setattr(model.weight, "data", torch.randn(4, dtype=torch.complex64).conj()),
        lambda: setattr(model.weight, "data", torch.randn(2, 2, dtype=torch.complex64).imag),
    ]
    with Checkpointer(tmp_path, {"model": model}, audit=True) as ckpt:
        ckpt.save(0).wait_committed()
        for step, change in enumerate(changes, start=1):
            change()
            expected = bits(model.weight)
            ckpt.save(step).wait_committed()
            assert bits(open_checkpoint(tmp_path, step).read("model.weight")) == expected


def test_ties_that_come_and_go_are_seen(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with Checkpointer(tmp_path, {"model": model}, audit=True) as ckpt:
        ckpt.save(1).wait_committed()
        model["b"].weight = model["a"].weight
        ckpt.save(2).wait_committed()
        model["b"].weight = nn.Parameter(torch.zeros(4, 4))
        ckpt.save(3).wait_committed()
    found = [open_checkpoint(tmp_path, n) for n in (1, 2, 3)]
    assert [len(c.manifest.aliases) for c in found] == [0, 1, 0]
    assert not found[2].read("model.b.weight").any()
