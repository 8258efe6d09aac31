import json
import pickle
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import bits, contents, load_once, save_once
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planaria.checkpoint.capture.warming import warm
from planaria.checkpoint.format.dtypes import _BY_NAME
from planaria.checkpoint.state import tree
from planaria.errors import CorruptError, PlanariaError, StateError

KINDS = ["bool", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64", "complex64"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = _BY_NAME[draw(st.sampled_from([*KINDS, "bfloat16", "float8_e5m2"]))].dtype
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return torch.ones(shape).mul(draw(st.integers(0, 1))).to(dtype)


arrays = hnp.arrays(
    st.sampled_from(KINDS).map(np.dtype), hnp.array_shapes(min_dims=0, min_side=0, max_side=3)
)
scalars = st.sampled_from(KINDS).map(np.dtype).flatmap(hnp.from_dtype)
keys = st.text(max_size=4) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
hashable = st.integers() | st.text(max_size=4) | st.binary(max_size=4)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=6)
    | st.binary(max_size=6)
    | st.binary(max_size=6).map(bytearray)
    | st.sets(hashable, max_size=3)
    | st.frozensets(hashable, max_size=3)
    | st.lists(st.integers(0, 9), max_size=3).map(torch.Size)
    | st.sampled_from([torch.float32, torch.qint8, torch.bool, torch.bits8])
    | st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)])
    | st.lists(hashable, max_size=4).map(Counter)
    | tensors()
    | arrays
    | scalars
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, inner, max_size=3).map(lambda d: defaultdict(list, d))
        | st.dictionaries(st.sampled_from(["$", "v", "a.b"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, set | frozenset | Counter):
        return type(a) is type(b) and a == b
    return contents(a) == contents(b)


@settings(max_examples=200)
@given(trees, st.booleans())
def test_round_trip(value, apart):
    kept: dict[str, torch.Tensor] = {}

    def sink(path: str, tensor: torch.Tensor) -> bool:
        if not apart or path in kept:
            return False
        kept[path] = tensor
        return True

    encoded = json.loads(json.dumps(tree.encode(value, "root", sink), allow_nan=False))
    again = tree.decode(encoded, kept.__getitem__)
    assert same(value, again)
    assert sorted(tree.references(encoded)) == sorted(kept)
    if isinstance(value, defaultdict):
        assert again.default_factory is value.default_factory


class Unknown:
    """Something that only pickle could store; it says so if anybody tries."""

    def __reduce__(self) -> tuple:
        raise AssertionError("somebody tried to pickle this")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": Unknown()}]}, "x.a.1.b"),
        ([lambda: 1], "x.0"),
        ({"f": print}, "x.f"),
        ({"n": SimpleNamespace()}, "x.n"),
        ({"p": Path()}, "x.p"),
        ({Unknown(): 1}, r"x \(a key\)"),
        ({"g": torch.Generator()}, "x.g"),
        ({"o": np.array([object()])}, "x.o"),
        ({"s": np.array(["text"])}, "x.s"),
        ({"r": np.zeros(2, dtype=[("a", "f4")])}, "x.r"),
        ({"d": np.array(0, dtype="datetime64[s]")}, "x.d"),
        ({"l": np.zeros(2, dtype=np.longdouble)}, "x.l"),
        ({"e": np.zeros(2, dtype=">f4")}, "x.e"),
        ({"z": np.str_("text")}, "x.z"),
        ({"m": torch.zeros(2, device="meta")}, "x.m"),
        ({"c": torch.zeros(2).to_sparse()}, "x.c"),
        (defaultdict(lambda: 3), "x"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_stored_is_named(value, path):
    with pytest.raises(StateError, match=f"'{path}'"):
        tree.encode(value, "x")


def test_cycles_are_named():
    loop: list = []
    loop.append({"again": loop})
    with pytest.raises(StateError, match=r"'x.*' contains itself"):
        tree.encode(loop, "x")


def test_integers_that_json_cannot_hold_are_refused():
    huge = 10**4400
    for value in (huge, [-huge], {huge: 1}, {huge, 1}, {"a": (huge,)}):
        with pytest.raises(StateError, match=r"'x.* holds an integer of \d+ bits"):
            tree.encode(value, "x")
    largest = 1 << 13_999
    assert tree.decode(json.loads(json.dumps(tree.encode([-largest], "x")))) == [-largest]


@pytest.mark.parametrize("depth", range(50, 1000, 50))
def test_deep_trees_are_stored_or_refused(depth, tmp_path):
    value: list = [7]
    for _ in range(depth):
        value = [value]
    try:
        encoded = tree.encode(value, "x")
    except StateError:
        return
    assert tree.decode(json.loads(json.dumps(encoded))) == value


TAGS = ["tensor", "ndarray", "dict", "set", "tuple", "size", "scalar", "bytes", "dtype", "device",
        "float", "complex", "defaultdict", "Counter", "OrderedDict"]  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$", "v", "ref", "dtype", "shape", "factory"]), inner)
        | st.fixed_dictionaries(
            {
                "$": st.sampled_from(TAGS),
                "v": inner,
            },
            optional={"dtype": inner, "shape": inner, "factory": inner},
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(JUNK)
def test_decoding_nonsense_ends_in_one_clear_error_or_plain_values(data):
    try:
        tree.decode(data)
    except PlanariaError:
        return


@pytest.mark.parametrize(
    "data",
    [
        {"$": "dtype", "v": "load"},
        {"$": "dtype", "v": "nn"},
        {"$": "pickle", "v": "gASVAAAA"},
        {"$": "defaultdict", "factory": "eval", "v": [["a", 1]]},
        {"$": "scalar", "dtype": "|O", "v": "AAAAAAAAAAA="},
        {"$": "device", "v": "nowhere:3"},
    ],
)
def test_stored_names_lead_to_nothing_executable(data):
    try:
        found = tree.decode(data)
    except CorruptError:
        return
    assert isinstance(found, defaultdict)
    assert found.default_factory is None


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    state = {"x": {"t": torch.ones(3), "a": np.ones(2), "s": {1, 2}, "n": np.float32(1)}}
    warm()  # numba's own cache of compiled code is its own affair

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    save_once(tmp_path, state)
    load_once(tmp_path, state)


def test_update_in_place_keeps_the_containers():
    inner, array, frozen = [1, 2], np.zeros(2), np.zeros(2)
    frozen.flags.writeable = False
    live = {"list": inner, "array": array, "gone": 1, "frozen": frozen, "shape": np.zeros(3)}
    new = {
        "list": [3],
        "array": np.ones(2),
        "frozen": np.ones(2),
        "shape": np.ones(4),
        "more": {"a": 1},
    }
    expected = contents(new)
    assert tree.update_in_place(live, new) is live
    assert contents(live) == expected
    assert live["list"] is inner
    assert live["array"] is array
    assert bits(frozen) == bits(np.zeros(2))
