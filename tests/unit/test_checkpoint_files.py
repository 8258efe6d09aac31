"""Data files: every dtype bit for bit, and readable by others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import bits, data_files, load_once, must_notice, save_once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.capture import copying, kernels
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.format.dtypes import _BY_NAME
from planaria.checkpoint.format.safetensors import PAGE, header_bytes, parse_header, place
from planaria.core.box import Box
from planaria.errors import StateError

# torch warns of what it thinks experimental, deprecated or done without a process group.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torch", "ignore:ComplexHalf", "ignore:.*quantize"
)

DTYPES = sorted(_BY_NAME)
# Quantised and sub-byte types have no plain elements; the rest of torch's dtypes must be stored.
WITHOUT_ELEMENTS = ("q", "bits", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "float4")


def every_bit_pattern(name: str) -> torch.Tensor:
    """1-D: all values of 8-bit kinds, the special ones and a random choice of the others."""
    stored = _BY_NAME[name]
    if name == "bool":
        return torch.tensor([True, False, True])
    generator = torch.Generator().manual_seed(len(name))
    raw = torch.randint(0, 256, (512 * stored.itemsize,), generator=generator, dtype=torch.uint8)
    if stored.itemsize == 1:
        raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    found = [raw.view(stored.dtype)]
    if stored.dtype.is_floating_point and stored.itemsize > 1:
        info = torch.finfo(stored.dtype)
        specials = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.tiny / 2, info.max]
        found.append(torch.tensor(specials, dtype=stored.dtype))
    if stored.dtype.is_complex:
        found.append(torch.tensor([complex(-0.0, float("nan")), complex(float("inf"), -0.0)])
                     .to(stored.dtype))  # fmt: skip
    return torch.cat([f.view(torch.uint8) for f in found]).view(stored.dtype)


def all_dtypes() -> dict[str, torch.Tensor]:
    return {name: every_bit_pattern(name) for name in DTYPES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dtypes")
    save_once(path, {"t": all_dtypes()}, 7)
    return path


def test_every_torch_dtype_is_in_the_table():
    kinds = {n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
    missing = {
        str(kind).removeprefix("torch.")
        for kind in set(kinds.values()) - {d.dtype for d in _BY_NAME.values()}
    }
    left = {n for n in missing if not n.removeprefix("u").startswith(WITHOUT_ELEMENTS)}
    assert not left


def test_every_dtype_comes_back_bit_for_bit(folder):
    target = {name: torch.zeros_like(tensor) for name, tensor in all_dtypes().items()}
    load_once(folder, {"t": target})
    whole = open_checkpoint(folder)
    for name, tensor in all_dtypes().items():
        assert bits(target[name]) == bits(tensor), name
        assert bits(whole.read(f"t.{name}")) == bits(tensor), name
        assert whole.read(f"t.{name}").dtype == tensor.dtype


def test_nan_is_flagged_in_every_dtype_that_has_one(folder, tmp_path):
    with_nan = {
        f"t.{name}"
        for name, tensor in all_dtypes().items()
        if (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        and bool(torch.isnan(to_wide(tensor)).any())
    }
    assert {"t.float8_e4m3fnuz", "t.float8_e8m0fnu", "t.bfloat16", "t.complex64"} <= with_nan
    assert set(open_checkpoint(folder).manifest.nan_names) == with_nan
    clean = {n: t[~torch.isnan(to_wide(t))] for n, t in all_dtypes().items() if has_nan_kind(t)}
    save_once(tmp_path, {"t": clean}, 1)
    assert open_checkpoint(tmp_path).manifest.nan_names == []


def has_nan_kind(tensor: torch.Tensor) -> bool:
    kind = tensor.dtype
    return (kind.is_floating_point and kind.itemsize > 1) or kind in (
        torch.complex64,
        torch.complex128,
    )


def to_wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor


@pytest.mark.parametrize("name", [n for n in DTYPES if _BY_NAME[n].nan_above])
def test_one_nan_among_many_is_found(name, tmp_path):
    stored = _BY_NAME[name]
    pattern = every_bit_pattern(name)
    if name == "complex32":
        nan = torch.view_as_real(pattern.to(torch.complex64)).isnan().any(-1).nonzero()[0, 0]
    else:
        nan = torch.isnan(to_wide(pattern)).nonzero()[0, 0]
    tensor = torch.zeros(9000 * stored.itemsize, dtype=torch.uint8).view(stored.dtype)
    tensor.view(torch.uint8)[-stored.itemsize :] = pattern[nan : nan + 1].view(torch.uint8)
    save_once(tmp_path, {"t": {"clean": torch.zeros(5), "bad": tensor}}, 1)
    assert open_checkpoint(tmp_path).manifest.nan_names == ["t.bad"]


def check_a_copy_looks(name: str) -> None:
    """Many pieces, at any address: the bytes are the same, and a NaN is seen wherever it is."""
    stored, size = _BY_NAME[name], _BY_NAME[name].itemsize
    pattern = every_bit_pattern(name)
    wide = pattern.to(torch.complex64) if name == "complex32" else to_wide(pattern)
    where = (torch.view_as_real(wide).isnan().any(-1) if wide.is_complex() else wide.isnan()).int()
    raw = pattern.view(torch.uint8).reshape(-1, size)
    whole, nan = raw[where == 0].reshape(-1).repeat(20)[: 700 * size], raw[where.argmax()]
    counts = [1, 7, 0, 640, 52]
    sizes = np.array(counts, dtype=np.int64) * size
    places = np.cumsum(sizes) - sizes
    for shift in (0, 1, size):
        source, target = torch.zeros(702 * size, dtype=torch.uint8), torch.zeros(700 * size).byte()
        for at in (None, 0, 7, 8, 300, 699):
            source[shift : shift + 700 * size] = whole
            if at is not None:
                source[shift + at * size :][:size] = nan
            pieces = places, source.data_ptr() + shift + places, sizes
            seen = kernels.copy_looking_for_nan(target.data_ptr(), *pieces, stored)
            assert seen == (at is not None), (shift, at)
            assert torch.equal(target, source[shift:][: 700 * size])


@pytest.mark.parametrize("name", [n for n in DTYPES if _BY_NAME[n].nan_above])
def test_a_copy_looks_for_nans(name):
    check_a_copy_looks(name)


def check_nan_of_the_second_save_is_flagged(root: Path) -> None:
    """The state is recognised then, and the NaN is one of many neighbours."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3000)) for _ in range(4)])
    with Checkpointer(root, {"m": model}) as ckpt:
        ckpt.save(1).wait_committed()
        with torch.no_grad():
            model[2][1234] = float("nan")
        ckpt.save(2).wait_committed()
    assert open_checkpoint(root, 1).manifest.nan_names == []
    assert open_checkpoint(root, 2).manifest.nan_names == ["m.2"]


def test_a_nan_is_flagged_where_the_state_is_recognised(tmp_path):
    check_nan_of_the_second_save_is_flagged(tmp_path)


def test_sabotage_a_copy_does_not_look(tmp_path, monkeypatch):
    def blind(*args: Any) -> bool:
        kernels.copy_pieces(*args[:4])
        return False

    monkeypatch.setattr(copying, "copy_looking_for_nan", blind)
    monkeypatch.setattr(CheckedCopy, "available", staticmethod(lambda: False))
    must_notice(check_nan_of_the_second_save_is_flagged, tmp_path)
    monkeypatch.setattr(kernels, "copy_looking_for_nan", blind)
    must_notice(check_a_copy_looks, "float32")


def test_dtypes_without_plain_elements_are_refused_by_name(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(StateError, match=r"'t\.q' has dtype torch.qint8.*int_repr"):
        save_once(tmp_path / "q", {"t": {"q": quantised}})
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(StateError, match=r"'t\.p'.*float4_e2m1fn_x2.*no stored form"):
        save_once(tmp_path / "p", {"t": {"p": packed}})


def test_safetensors_reads_every_tensor(folder):
    expected = {f"t.{name}": tensor for name, tensor in all_dtypes().items()}
    (file,) = data_files(folder, 7)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(expected)
        for name, tensor in expected.items():
            assert bits(opened.get_tensor(name)) == bits(tensor), name
    head = file.read_bytes()[: int.from_bytes(file.read_bytes()[:8], "little") + 8]
    assert len(head) % PAGE == 0
    end = max(stop for _, _, _, stop in parse_header(head).values())
    assert file.stat().st_size == len(head) + end, "exact length, no hole at the end"


def test_torch_reads_the_files_as_hugging_face_ones(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    extra = {
        "half": torch.randn(3, 4).half(),
        "bf16": torch.randn(7).bfloat16(),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "ints": torch.arange(5),
        "flags": torch.tensor([True, False]),
    }
    save_once(tmp_path, {"model": model, "x": extra}, 3)
    expected = {f"model.{k}": v for k, v in model.state_dict().items()}
    expected.update({f"x.{k}": v for k, v in extra.items()})
    target = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "step-00000003"))
    dcp.load(target, storage_reader=reader, no_dist=True)
    for name, tensor in expected.items():
        assert bits(target[name]) == bits(tensor), name


parts = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=5),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.sampled_from(DTYPES),
        st.integers(1, 3),
    ),
    max_size=6,
    unique_by=lambda p: p[0],
)


@settings(
    max_examples=40,
    # One folder for all examples: each writes its own bytes over the last one's.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(parts)
def test_headers_are_valid_aligned_and_without_holes(tmp_path, parts):
    boxes = [
        (name, shape, box, _BY_NAME[dtype])
        for name, shape, dtype, slabs in parts
        for box in Box.full(shape).split_rows(slabs)
    ]
    entries = place(boxes)
    assert sorted((e.name, e.box) for e in entries) == sorted((b[0], b[2]) for b in boxes)
    at = 0
    for entry in entries:
        assert entry.start == at
        assert entry.start % entry.dtype.itemsize == 0
        at += entry.nbytes
    head = header_bytes(entries, 5)
    assert len(head) % PAGE == 0
    file = tmp_path / "x.safetensors"
    file.write_bytes(head + bytes(at))
    with safe_open(file, "pt") as opened:
        assert len(list(opened.keys())) == len(entries)
        meta = opened.metadata()
    ours = json.loads(meta["planaria"])
    assert ours["step"] == 5
    listed = sorted((tuple(o), tuple(e)) for _, _, o, e in ours["boxes"].values())
    assert listed == sorted((e.box.offset, e.box.extent) for e in entries)
