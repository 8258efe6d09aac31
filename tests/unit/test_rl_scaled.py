"""fp8 with scales: rollouts get the bits and the scales that the trainer quantised to."""

import pytest
import torch
from rl_models import Tied
from torch import nn

from planaria.errors import ConfigError, NotSupportedError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.adapters.scaled import ScaledCopy, scales_for, unscaled

BLOCK = (16, 24)
MOST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def trainer() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def scales_of(
    rows: torch.Tensor, columns: int, dtype: torch.dtype, powers_of_two: bool = True
) -> torch.Tensor:
    """The scales of blocks of some columns that have these rows."""
    most = torch.stack([part.abs().amax() for part in rows.split(columns, dim=1)])
    return scales_for(most, dtype, powers_of_two=powers_of_two)


def empty_like(copy: nn.Module) -> dict[str, torch.Tensor]:
    """A rollout's tensors: names, shapes and dtypes as the trainer's copy has them."""
    return {k: torch.zeros_like(v) for k, v in copy.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


@pytest.mark.parametrize("block", [BLOCK, None], ids=["blocks", "tensor"])
@pytest.mark.parametrize("dtype", list(MOST), ids=str)
def test_rollouts_get_numbers_and_scales(block: tuple[int, int] | None, dtype: torch.dtype) -> None:
    model = trainer()
    copy = ScaledCopy(model, dtype=dtype, block=block)
    there = empty_like(copy)
    suffix = "_scale" if block is None else "_scale_inv"
    assert "mlp.0.weight" + suffix in there
    assert there["mlp.0.weight"].dtype == dtype
    assert there["norm.weight"].dtype == torch.bfloat16
    with (
        Publisher(copy, "tcp://127.0.0.1:0", block_elements=500) as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        for version in range(4):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.3 * version * torch.randn_like(p))
            copy.refresh()
            publisher.publish(version)
            subscriber.update(at_least=version)
            assert same(copy.state_dict(), there)
            assert same(ScaledCopy(model, dtype=dtype, block=block).state_dict(), there)
    weight = model.get_parameter("mlp.0.weight").detach()
    back = unscaled(there["mlp.0.weight"], there["mlp.0.weight" + suffix], block)
    step = 2.0 ** -(3 if dtype == torch.float8_e4m3fn else 2)
    least = 2.0 ** (-9 if dtype == torch.float8_e4m3fn else -16)
    scales = unscaled(torch.ones_like(weight).to(dtype), there["mlp.0.weight" + suffix], block)
    assert ((back - weight).abs() <= (weight.abs() * step / 2).maximum(least * scales)).all()


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("dtype", list(MOST), ids=str)
def test_scales_use_the_range_and_never_leave_it(dtype: torch.dtype, powers: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-120, 100, 7):
        rows = torch.randn(8, 50, generator=generator) * 2.0**exponent
        scales = scales_of(rows, 16, dtype, powers_of_two=powers)
        assert scales.shape == (4,)
        for i, part in enumerate(rows.split(16, dim=1)):
            largest = float(part.abs().max() / scales[i])
            assert largest <= MOST[dtype] * (1 + 1e-5)  # free scales are rounded themselves
            assert largest > MOST[dtype] * 0.49 or scales[i] <= 2.0**-126
            assert torch.isfinite((part / scales[i]).to(dtype).float()).all()
        if powers:
            assert (torch.frexp(scales)[0] == 0.5).all()


def test_blocks_without_a_scale_of_their_own() -> None:
    rows = torch.tensor([[0.0, 0.0, torch.inf, 1.0, torch.nan, 2.0, 3e-45, 0.0]])
    scales = scales_of(rows, 2, torch.float8_e4m3fn)
    assert scales[:3].tolist() == [1, 1, 1]
    assert scales[3] > 0
    exact = scales_of(torch.tensor([[448.0, 1, 449.0, 1]]), 2, torch.float8_e4m3fn)
    assert exact.tolist() == [1, 2]


def test_small_steps_move_few_scales_if_they_are_powers_of_two() -> None:
    moved = {}
    for powers in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(256, 256)
        copy = ScaledCopy(model, block=(32, 32), powers_of_two=powers)
        before = {k: v.clone() for k, v in copy.state_dict().items()}
        with torch.no_grad():
            model.weight.add_(1e-4 * torch.randn_like(model.weight))
        copy.refresh()
        changed = copy.get_buffer("weight_scale_inv") != before["weight_scale_inv"]
        moved[powers] = float(changed.float().mean())
    assert moved[True] < 0.1 < 0.9 < moved[False]


def test_tied_weights_stay_tied_and_are_not_quantised() -> None:
    copy = ScaledCopy(trainer(), block=BLOCK)
    state = dict(copy.named_buffers(remove_duplicate=False))
    assert state["embed.weight"] is state["head.weight"]
    assert state["embed.weight"].dtype == torch.bfloat16
    everything = ScaledCopy(trainer(), block=BLOCK, scaled=lambda name, t: t.ndim == 2)
    assert everything.get_buffer("embed.weight").dtype == torch.float8_e4m3fn


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ConfigError, match="no fp8"):
        ScaledCopy(trainer(), dtype=torch.float16)
    with pytest.raises(ConfigError, match="block"):
        ScaledCopy(trainer(), block=(0, 4))
    with pytest.raises(NotSupportedError, match=r"norm\.weight.*1 dimensions"):
        ScaledCopy(trainer(), scaled=lambda name, t: name == "norm.weight")


def test_a_copy_that_is_not_refreshed_would_be_noticed() -> None:
    model = trainer()
    copy = ScaledCopy(model, block=BLOCK)
    with torch.no_grad():
        model.get_parameter("mlp.0.weight").mul_(3)
    fresh = ScaledCopy(model, block=BLOCK).state_dict()
    assert not same(copy.state_dict(), fresh)
    copy.refresh()
    assert same(copy.state_dict(), fresh)
    assert unscaled(fresh["mlp.0.weight"], fresh["mlp.0.weight_scale_inv"], BLOCK).isfinite().all()
