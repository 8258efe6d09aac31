"""What differs between two checkpoints, against plain comparisons of torch and of numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import data_files, flip, must_notice
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.checkpoint import Checkpointer, compare, open_checkpoint, ulp
from planaria.checkpoint.compare import Comparison, pieces
from planaria.checkpoint.format.dtypes import dtype_by_name, stored_dtype
from planaria.checkpoint.ulp import Distance, distance
from planaria.core.box import Box
from planaria.errors import CorruptError

FLOATS = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_bits(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with these bits."""
    size = dtype.itemsize
    raw = bytearray(b"".join(v.to_bytes(size, "little") for v in values))
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype)


def apart(a: Any, b: Any, dtype: str) -> Distance:
    stored = dtype_by_name(dtype)
    x, y = (
        v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=stored.dtype) for v in (a, b)
    )
    return distance(x, y, stored)


@pytest.mark.parametrize("name", [n for n in FLOATS if dtype_by_name(n).itemsize <= 2])
def test_ulps_count_the_numbers_between(name: str) -> None:
    """Every number of a small dtype, sorted: neighbours are 1 ULP apart, and so on."""
    stored = dtype_by_name(name)
    everything = of_bits(list(range(1 << (8 * stored.itemsize))), stored.dtype)
    real = everything.double()
    numbers = real[~real.isnan()]
    order = numbers.argsort(stable=True)
    ordered = everything[~real.isnan()].view(INTS[stored.itemsize])[order].view(stored.dtype)
    values = numbers[order]
    # Both zeros count as one number.
    place = torch.cat([torch.zeros(1), (values.diff() > 0).cumsum(0).float()])
    for shift in (1, 7, 100):
        a, b = ordered[:-shift], ordered[shift:]
        expected = int((place[shift:] - place[:-shift]).max())
        found = distance(a.clone(), b.clone(), stored)
        assert found.max_ulp == expected
        assert found.nan == 0
        finite = (values[shift:] - values[:-shift]).abs()
        assert found.max_abs == finite[~finite.isnan()].max().item()


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_ulps_of_doubles(a, b) -> None:
    found = apart([a], [b], "float64")

    def ordered(v: float) -> int:
        bits = int(torch.tensor([v], dtype=torch.float64).view(torch.int64)[0])
        return bits if bits >= 0 else -(bits + (1 << 63))

    same = math.copysign(1, a) == math.copysign(1, b) and a == b
    assert found.differing == (not same)
    assert found.max_ulp == abs(ordered(a) - ordered(b))
    if found.differing and math.isfinite(a) and math.isfinite(b):
        assert found.max_abs == abs(a - b)


@given(
    st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]),
    st.data(),
)
def test_whole_numbers_do_not_overflow(name, data) -> None:
    dtype = getattr(torch, name)
    info = torch.iinfo(dtype)
    values = st.lists(st.integers(info.min, info.max), min_size=3, max_size=3)
    a, b = data.draw(values), data.draw(values)
    found = distance(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype),
                     stored_dtype(dtype, "t"))  # fmt: skip
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    assert found.max_abs == float(max(gaps))
    assert found.differing == sum(g > 0 for g in gaps)
    assert found.max_ulp is None


def test_nans_zeros_and_infinities() -> None:
    nan, inf = math.nan, math.inf
    assert apart([nan, 1.0], [nan, 1.0], "float32").differing == 0
    found = apart([nan, 1.0, 3.0], [1.0, nan, 3.5], "float32")
    assert (found.differing, found.nan, found.max_abs, found.worst) == (3, 2, 0.5, 2)
    other = apart(of_bits([0x7FC00000], torch.float32), of_bits([0x7FC00001], torch.float32),
                  "float32")  # fmt: skip
    assert (other.differing, other.nan, other.max_ulp, other.worst) == (1, 1, 0, None)
    zeros = apart([0.0], [-0.0], "bfloat16")
    assert (zeros.differing, zeros.max_abs, zeros.max_rel, zeros.max_ulp) == (1, 0.0, 0.0, 0)
    far = apart([inf, 1.0], [-inf, 2.0], "float16")
    assert (far.max_abs, far.max_rel, far.max_ulp) == (inf, inf, 2 * 0x7C00)


def test_complex_numbers_count_once() -> None:
    found = apart([1 + 2j, 3 + 4j], [1.5 + 2.5j, 3 + 4j], "complex64")
    assert (found.elements, found.differing, found.max_abs, found.worst) == (2, 1, 0.5, 0)
    found = apart([1 + 2j, 3 + 4j], [1 + 2j, complex(math.nan, 4)], "complex128")
    assert (found.differing, found.nan) == (1, 1)


@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.integers(1, 40),
)
def test_pieces_make_up_the_box(shape, most) -> None:
    parts = list(pieces(Box.full(shape), most))
    count = torch.zeros(shape)
    for part in parts:
        assert part.volume <= most
        count[part.slices()] += 1
    assert bool((count == 1).all())


# Of checkpoints


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(300, 70, generator=generator)
    return {
        "big": big,
        "half": torch.ones(5, dtype=torch.bfloat16),
        "whole": torch.arange(7),
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 3),
        "lr": 0.1,
        "nested": {"list": [1, 2, {"x": 3}]},
    }


def saved(path: Path, state: dict[str, Any], step: int = 1) -> None:
    with Checkpointer(path, {"s": state}, audit=True) as ckpt:
        ckpt.save(step)


def compared(tmp_path: Path, other: dict[str, Any]) -> Comparison:
    saved(tmp_path / "a", tensors())
    saved(tmp_path / "b", other)
    return compare.compare(
        open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"),
        lambda name: not name.startswith("rng"),
    )  # fmt: skip


def test_equal_is_equal(tmp_path) -> None:
    found = compared(tmp_path, tensors())
    assert found.equal
    assert found.compared == 5


def check_every_kind_is_found(tmp_path: Path) -> None:
    other = tensors()
    other["big"][299, 69] += 0.5
    other["big"][3, 1] += 0.25
    other["half"][2] = math.nan
    other["whole"] = other["whole"].int()
    other["none"] = torch.zeros(0, 4)
    other["new"] = other.pop("scalar")
    other["lr"] = 0.2
    other["nested"]["list"][2] = {"y": 3}
    found = compared(tmp_path, other)
    by_name = {t.name: t for t in found.tensors}
    assert {n: t.what for n, t in by_name.items()} == {
        "s.big": "values", "s.half": "values", "s.whole": "dtype", "s.none": "shape",
        "s.new": "only in B", "s.scalar": "only in A",
    }  # fmt: skip
    big = by_name["s.big"]
    assert (big.differing, big.elements, big.worst) == (2, 21000, (299, 69))
    assert big.max_abs == pytest.approx(0.5)
    assert (by_name["s.half"].nan, by_name["s.half"].max_ulp) == (1, 0)
    assert sorted((o.path, o.a, o.b, o.what) for o in found.objects) == [
        ("s.lr", 0.1, 0.2, "values"),
        ("s.nested.list.2.x", 3, None, "only in A"),
        ("s.nested.list.2.y", None, 3, "only in B"),
    ]


def test_every_kind_is_found(tmp_path, monkeypatch) -> None:
    check_every_kind_is_found(tmp_path / "whole")
    monkeypatch.setattr(compare, "BATCH_NBYTES", 1000)  # in many pieces
    check_every_kind_is_found(tmp_path / "pieces")


def test_memory_is_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "BATCH_NBYTES", 4096)
    saved(tmp_path / "a", tensors())
    one = open_checkpoint(tmp_path / "a")
    sizes = []
    read = one.read_many

    def watched(parts: Any) -> list[torch.Tensor]:
        result = read(parts)
        sizes.append(sum(t.nbytes for t in result))
        return result

    monkeypatch.setattr(one, "read_many", watched)
    assert compare.compare(one, one).equal
    assert len(sizes) > 300 * 70 * 4 / 4096 - 1
    assert max(sizes) <= 4096


def test_what_is_damaged_is_not_compared(tmp_path) -> None:
    saved(tmp_path / "b", tensors())
    flip(data_files(tmp_path / "b", 1)[0], -1)
    saved(tmp_path / "a", tensors())
    with pytest.raises(CorruptError, match="chunk 0"):
        compare.compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))


def test_tied_weights_are_compared_once_or_by_both_names(tmp_path) -> None:
    shared = torch.ones(3)
    tied, untied = {"a": shared, "b": shared}, {"a": shared.clone(), "b": shared.clone()}
    saved(tmp_path / "a", tied)
    saved(tmp_path / "b", untied)
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert compare.compare(a, b).equal
    assert compare.compare(a, a).nbytes == 12
    untied["b"][0] = 2.0
    saved(tmp_path / "c", untied)
    (found,) = compare.compare(a, open_checkpoint(tmp_path / "c")).tensors
    assert (found.name, found.max_abs) == ("s.b", 1.0)


@settings(max_examples=15)
@given(st.sampled_from(FLOATS), st.integers(0, 255), st.integers(0, 20))
def test_a_single_bit_is_found(name, byte, place) -> None:
    dtype = dtype_by_name(name).dtype
    values = torch.zeros(21, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    other = values.clone()
    raw = other.view(torch.uint8)
    raw[place * dtype.itemsize] = byte
    assert distance(values, other, dtype_by_name(name)).differing == (byte != 0)


def test_sabotage_nans_pass_unseen(tmp_path, monkeypatch) -> None:
    def blind(a: torch.Tensor, b: torch.Tensor, stored: Any) -> Distance:
        return ulp.distance(a.nan_to_num(1.0), b.nan_to_num(1.0), stored)

    monkeypatch.setattr(compare, "distance", blind)
    must_notice(check_every_kind_is_found, tmp_path)
