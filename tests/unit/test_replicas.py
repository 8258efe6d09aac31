"""Replicas that are not equal are found: whole ones, and in a sample."""

import torch

from planaria.checkpoint.capture.replicas import (
    SAMPLE_TENSORS,
    first_difference,
    sampled_checksums,
    whole_checksums,
)
from planaria.checkpoint.state.entries import Collector


def collected(**tensors: torch.Tensor) -> Collector:
    out = Collector()
    for name, tensor in tensors.items():
        out.tensor(name, tensor, lazy=True)
    return out


def samples(step: int, *ranks: Collector) -> list[dict[str, int]]:
    return [sampled_checksums(r.tensors, {}, step) for r in ranks]


def test_equal_replicas_agree_whatever_else_a_rank_holds() -> None:
    weight = torch.randn(3000)
    first = collected(a=weight, b=torch.randn(5))
    second = collected(a=weight.clone(), c=torch.randn(5))
    assert first_difference(samples(7, first, second)) is None


def test_ranks_that_train_apart_are_told() -> None:
    first = collected(a=torch.zeros(3000), b=torch.ones(2))
    second = collected(a=torch.ones(3000), b=torch.ones(2))
    assert first_difference(samples(7, first, second)) == ("a at [0]", 0, 1)


def test_the_sample_moves_from_step_to_step() -> None:
    state = collected(**{f"t{i}": torch.arange(5000.0) for i in range(SAMPLE_TENSORS * 3)})
    seen: set[str] = set()
    for step in range(40):
        (found,) = samples(step, state)
        assert len(found) == SAMPLE_TENSORS
        seen |= found.keys()
    assert len(seen) == SAMPLE_TENSORS * 3


def test_what_a_caller_gives_is_compared_whole() -> None:
    out = Collector()
    out.tensor("x", torch.arange(10), lazy=False, same_everywhere=True)
    out.tensor("y", torch.arange(10), lazy=False)
    assert whole_checksums(out.tensors, {}).keys() == {"x"}
