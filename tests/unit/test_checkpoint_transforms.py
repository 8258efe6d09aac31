"""Renaming, fusing, splitting and padding on the way in, against the same with torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import bits, contents, load_once, randomise, save_once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from planaria.checkpoint import Fuse, Pad, Rename, Split
from planaria.checkpoint.layout.transforms import Transform
from planaria.errors import ConfigError, MismatchError

Tensors = dict[str, torch.Tensor]


def module_of(tensors: Tensors) -> Any:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    return module


SHAPES = {"a": (6, 4), "b": (6, 4), "c": (2, 4), "d": (6, 3), "e": (5,), "f": (2, 3, 4), "g": ()}
STORED = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, (name, shape) in enumerate(SHAPES.items())
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_once(path, {"m": module_of(STORED)})
    return path


def rename(draw: st.DrawFn, now: Tensors, fresh: str) -> tuple[Transform, Tensors]:
    old = draw(st.sampled_from(sorted(now)))
    after = {fresh if name == old else name: tensor for name, tensor in now.items()}
    if draw(st.booleans()):
        return Rename(f"m.{old}", f"m.{fresh}"), after
    return Rename(lambda name: f"m.{fresh}" if name == f"m.{old}" else name), after


def fuse(draw: st.DrawFn, now: Tensors, fresh: str) -> tuple[Transform, Tensors] | None:
    first = draw(st.sampled_from(sorted(now)))
    dims = now[first].dim()
    if not dims:
        return None
    dim = draw(st.integers(-dims, dims - 1))

    def rest(name: str) -> list[int]:
        sizes = list(now[name].shape)
        del sizes[dim]
        return sizes

    like = [n for n in sorted(now) if now[n].dim() == dims and rest(n) == rest(first)]
    names = draw(st.lists(st.sampled_from(like), min_size=1, max_size=3, unique=True))
    after = {name: tensor for name, tensor in now.items() if name not in names}
    after[fresh] = torch.cat([now[name] for name in names], dim)
    return Fuse([f"m.{n}" for n in names], f"m.{fresh}", dim), after


def split(draw: st.DrawFn, now: Tensors, fresh: str) -> tuple[Transform, Tensors] | None:
    name = draw(st.sampled_from(sorted(now)))
    dims = now[name].dim()
    if not dims:
        return None
    dim = draw(st.integers(-dims, dims - 1))
    size = now[name].shape[dim]
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=2)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    after = {n: t for n, t in now.items() if n != name}
    parts = {f"{fresh}{i}": part for i, part in enumerate(now[name].split(sizes, dim))}
    into = {f"m.{n}": n_rows for n, n_rows in zip(parts, sizes, strict=True)}
    return Split(f"m.{name}", into, dim), after | parts


def pad(draw: st.DrawFn, now: Tensors, fresh: str) -> tuple[Transform, Tensors]:
    name = draw(st.sampled_from(sorted(now)))
    shape = [draw(st.integers(0, size + 2)) for size in now[name].shape]
    fill = draw(st.sampled_from([0.0, -1.5, 7.0]))
    grown = torch.full(shape, fill)
    kept = tuple(slice(0, min(a, b)) for a, b in zip(shape, now[name].shape, strict=True))
    grown[kept] = now[name][kept]
    return Pad(f"m.{name}", shape, fill), now | {name: grown}


@settings(
    max_examples=80,
    # The checkpoint is only read.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_compositions_equal_those_of_torch(saved, data):
    now, transforms = dict(STORED), []
    for i in range(data.draw(st.integers(1, 5))):
        act = data.draw(st.sampled_from([rename, fuse, split, pad]))
        made = act(data.draw, now, f"n{i}_")
        if made is not None:
            transforms.append(made[0])
            now = made[1]
    target = module_of({name: torch.full_like(tensor, 99.0) for name, tensor in now.items()})
    load_once(saved, {"m": target}, transforms=transforms)
    for name, tensor in now.items():
        assert bits(getattr(target, name)) == bits(tensor), (name, transforms)


class Attention(nn.Module):
    def __init__(self, fused: bool, layers: int = 2) -> None:
        super().__init__()
        for i in range(layers):
            for name in ["qkv"] if fused else ["q", "k", "v"]:
                self.add_module(f"{name}{i}", nn.Linear(4, 12 if fused else 4))


def test_patterns_are_filled_in_alike(tmp_path):
    apart: Any = randomise(Attention(False), 1)
    fused: Any = Attention(True)
    save_once(tmp_path / "apart", {"m": apart})
    join = [Fuse(["m.q*", "m.k*", "m.v*"], "m.qkv*")]
    load_once(tmp_path / "apart", {"m": fused}, transforms=join)
    assert torch.equal(
        fused.qkv1.weight, torch.cat([apart.q1.weight, apart.k1.weight, apart.v1.weight])
    )
    save_once(tmp_path / "fused", {"m": fused})
    again = Attention(False)
    cut = [Split("m.qkv*", {"m.q*": 4, "m.k*": 4, "m.v*": 4})]
    load_once(tmp_path / "fused", {"m": again}, transforms=cut)
    assert contents(again) == contents(apart)
    both = Attention(True)
    load_once(tmp_path / "fused", {"m": both}, transforms=[*cut, *join])
    assert contents(both) == contents(fused)


def test_a_renamed_prefix(tmp_path):
    model = randomise(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), 1)
    save_once(tmp_path, {"m": model})
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    rename = Rename("m.*", "net.*")
    load_once(tmp_path, {"net": target}, transforms=[rename])
    assert contents(target) == contents(model)
    load_once(tmp_path, {"net": target}, only=["net.1"], transforms=[rename])


def test_a_flag_of_nan_follows_the_tensor(tmp_path):
    bad = {"a": torch.full((2,), float("nan")), "b": torch.zeros(2)}
    save_once(tmp_path, {"m": module_of(bad)})
    target = module_of({"ab": torch.zeros(4)})
    report = load_once(tmp_path, {"m": target}, transforms=[Fuse(["m.a", "m.b"], "m.ab")])
    assert report.nan_names == ["m.ab"]


BAD: dict[str, tuple[Callable[[], Transform], str]] = {
    "rename_nothing": (lambda: Rename("m.zz", "m.y"), "'m.zz' matches no tensor"),
    "rename_pattern": (lambda: Rename("x.*", "m.*"), r"'x\.\*' matches no tensor"),
    "rename_function": (lambda: Rename(lambda n: n), "changes no name"),
    "rename_clash": (lambda: Rename("m.a", "m.b"), "the same name"),
    "rename_stars": (lambda: Rename("m.*", "m"), "either all of its names have a"),
    "two_stars": (lambda: Rename("*.*", "*.*"), "more than one"),
    "fuse_nothing": (lambda: Fuse(["m.x", "m.y"], "m.z"), "'m.x' matches no tensor"),
    "fuse_half": (lambda: Fuse(["m.a", "m.y"], "m.z"), "has no tensor 'm.y'"),
    "fuse_shapes": (lambda: Fuse(["m.a", "m.e"], "m.z"), "differ in shape"),
    "fuse_dim": (lambda: Fuse(["m.a", "m.b"], "m.z", 2), "no dimension 2"),
    "fuse_scalar": (lambda: Fuse(["m.g"], "m.z"), "no dimension 0"),
    "fuse_clash": (lambda: Fuse(["m.a", "m.b"], "m.c"), "a tensor 'm.c' already"),
    "fuse_stars": (lambda: Fuse(["m.*", "m.b"], "m.*"), "either all of its names have a"),
    "split_nothing": (lambda: Split("m.x", {"m.y": 1}), "'m.x' matches no tensor"),
    "split_sizes": (lambda: Split("m.a", {"m.x": 1, "m.y": 1}), "has 6 indices.*not 2"),
    "split_negative": (lambda: Split("m.a", {"m.x": 8, "m.y": -2}), "must be >= 0"),
    "split_dim": (lambda: Split("m.a", {"m.x": 6}, -3), "no dimension -3"),
    "split_clash": (lambda: Split("m.a", {"m.b": 3, "m.y": 3}), "a tensor 'm.b' already"),
    "pad_nothing": (lambda: Pad("m.x", [1]), "'m.x' matches no tensor"),
    "pad_dims": (lambda: Pad("m.a", [8]), "has shape"),
    "pad_negative": (lambda: Pad("m.a", [8, -1]), "must be >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_transform_that_does_not_fit_is_refused(name, saved):
    make, text = BAD[name]
    target = module_of(STORED)
    before = contents(target)
    with pytest.raises(ConfigError, match=text):
        load_once(saved, {"m": target}, transforms=[make()])
    assert contents(target) == before


def test_order_matters_and_leftovers_are_told(saved):
    target = module_of({"x": torch.zeros(6, 4)})
    with pytest.raises(MismatchError, match=r"not in the state: m\.b, m\.c"):
        load_once(saved, {"m": target}, transforms=[Rename("m.a", "m.x")])
    swap = [Rename("m.a", "m.t"), Rename("m.b", "m.a"), Rename("m.t", "m.b")]
    both = module_of(STORED)
    load_once(saved, {"m": both}, transforms=swap)
    assert bits(both.a) == bits(STORED["b"])
    assert bits(both.b) == bits(STORED["a"])
