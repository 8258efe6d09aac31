"""When a state that is laid out as it was is looked at: after all that may change it was asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bits, must_notice
from torch import nn

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.state.recall import Recalled, StateLayout, Structure


class Moves:
    """Its state_dict makes a parameter show other memory, once."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter, self.due = parameter, False

    def state_dict(self) -> dict[str, Any]:
        if self.due:
            self.due, self.old = False, self.parameter.data
            self.parameter.data = self.old.clone()
            self.old.fill_(-7)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def check_memory_that_a_state_dict_replaces(root: Path) -> None:
    first = nn.Linear(4, 6)
    model, weight = nn.Sequential(first, nn.BatchNorm1d(6), nn.Linear(6, 6)), first.weight
    moves = Moves(weight)
    with Checkpointer(root, {"model": model, "moves": moves}) as ckpt:
        for n in (1, 2, 3):
            moves.due = n > 1
            ckpt.save(n).wait_committed()
            assert bits(open_checkpoint(root, n).read("model.0.weight")) == bits(weight)


def test_memory_that_a_state_dict_replaces_is_not_read(tmp_path: Path) -> None:
    check_memory_that_a_state_dict_replaces(tmp_path)


def test_sabotage_addresses_are_compared_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, find = Structure.again, StateLayout.find
    found: list[Recalled | None] = []

    def find_at_once(self: Structure) -> list[Any] | None:
        things = again(self)
        found[:] = [find(layouts[-1], things) if things and layouts else None]
        return things

    layouts: list[StateLayout] = []
    make = StateLayout.__init__

    def noted(self: StateLayout, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        layouts.append(self)

    monkeypatch.setattr(StateLayout, "__init__", noted)
    monkeypatch.setattr(Structure, "again", find_at_once)
    monkeypatch.setattr(StateLayout, "find", lambda *_: found[-1])
    must_notice(check_memory_that_a_state_dict_replaces, tmp_path)
