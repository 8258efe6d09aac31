import copy
import json
from typing import Any

import pytest
import torch
from checkpoints import JSON_JUNK, places, signed
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.dtypes import _BY_NAME
from planaria.checkpoint.format.manifest import (
    FORMAT,
    FileInfo,
    Manifest,
    StoredBox,
    TensorInfo,
)
from planaria.core.box import Box
from planaria.errors import CorruptError, FormatError, StorageError


def file_info(name: str, nbytes: int, chunk: int = 4096) -> FileInfo:
    return FileInfo(name, 4096, nbytes, chunk, 7, list(range(-(-nbytes // chunk))))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = [
        file_info(f"rank-{i:05d}-ab.safetensors", draw(st.integers(1 << 14, 1 << 15)))
        for i in range(draw(st.integers(1, 3)))
    ]
    tensors = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = _BY_NAME[draw(st.sampled_from(sorted(_BY_NAME)))]
        boxes = [
            StoredBox(box, draw(st.integers(0, len(files) - 1)), 16 * draw(st.integers(0, 20)))
            for box in Box.full(shape).split_rows(draw(st.integers(1, 3)))
        ]
        tensors[name] = TensorInfo(dtype, shape, boxes, draw(st.booleans()))
    aliases = {f"{name}/again": name for name in tensors if draw(st.booleans())}
    return Manifest(
        step=draw(st.integers(0, 1 << 40)),
        attempt="00ab",
        created=draw(st.floats(0, 1e10)),
        world_size=draw(st.integers(1, 9)),
        files=files,
        tensors=tensors,
        aliases=aliases,
        objects={
            "rng": {"all": draw(JSON_JUNK)},
            "data": {"ranks": {"0": 1, "1": draw(JSON_JUNK)}},
        },
        metrics={"loss": 0.5},
        run={"torch": "2"},
    )


def example() -> Manifest:
    box = Box.full((3, 2))
    f32 = _BY_NAME["float32"]
    return Manifest(
        step=120,
        attempt="00ab",
        created=1e9,
        world_size=1,
        files=[file_info("rank-00000-ab.safetensors", 9000)],
        tensors={"model.w": TensorInfo(f32, (3, 2), [StoredBox(box, 0, 32)])},
        aliases={"model.tied": "model.w"},
        objects={"rng": {"all": [1, 2]}},
    )


def body_of(manifest: Manifest) -> dict[str, Any]:
    return json.loads(manifest.to_bytes())["manifest"]


def read(data: bytes) -> Manifest:
    return Manifest.from_bytes(data, "here/manifest.json")


@settings(max_examples=60)
@given(manifests())
def test_round_trip(manifest):
    again = read(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert json.loads(manifest.to_bytes())["manifest"]["step"] == manifest.step
    assert sorted(again.names()) == sorted([*manifest.tensors, *manifest.aliases])
    for alias, name in manifest.aliases.items():
        assert again.resolve(alias) == manifest.tensors[name]


def test_every_flip_is_refused():
    whole = example().to_bytes()
    for position in range(len(whole)):
        for mask in (0x01, 0x20, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            with pytest.raises(CorruptError, match="here/manifest"):
                read(bytes(damaged))


def test_every_cut_and_every_addition_is_refused():
    whole = example().to_bytes()
    for cut in range(len(whole)):
        with pytest.raises(CorruptError):
            read(whole[:cut])
        with pytest.raises(CorruptError):
            read(whole[cut + 1 :])
    for more in (b"\n", b" ", whole):
        with pytest.raises(CorruptError):
            read(whole + more)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "..",
        ".safetensors",
        "x.safetensors\n",
        "x.safetensors\0",
        "x.json",
        "",
        7,
        None,
        "a" * 200 + ".safetensors",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(name):
    body = body_of(example())
    body["files"][0][0] = name
    with pytest.raises(CorruptError, match="does not stay inside"):
        read(signed(body))


def test_a_newer_format_is_refused_as_such():
    body = body_of(example())
    body["format"] = FORMAT + 1
    body["tensors"] = "told in a way that only format 3 knows"
    newer = rf"^here/manifest.json: format {FORMAT + 1} is newer.*install a newer"
    with pytest.raises(FormatError, match=newer):
        read(signed(body))


@pytest.mark.parametrize(
    "data",
    [
        b'{"blake3":"00","manifest":{"format":3}}',
        b'{"format": 3, "body": "told in a way that only format 3 knows"}',
        b'{"sha256":"' + b"0" * 64 + b'","signature":"","manifest":{"format":7}}\n',
    ],
)
def test_a_newer_format_in_another_container_is_refused_as_such(data):
    with pytest.raises(FormatError, match=r"^here/manifest.json: format \d is newer") as caught:
        read(data)
    assert str(caught.value).count("here") == 1


@pytest.mark.parametrize(
    "data",
    [
        b'{"blake3":"00","manifest":{"format":1}}',
        b'{"blake3":"00","manifest":{"format":"2"}}',
        b'{"blake3":"00","manifest":{"format":2}',
        b'{"blake3":"00","manifest":[]}',
        signed({"format": 2}).replace(b"2}", b"3}"),
        b"[]",
        b"2",
    ],
)
def test_another_container_without_a_newer_format_is_damaged(data):
    with pytest.raises(CorruptError, match="is damaged"):
        read(data)


def test_unknown_dtype_and_checksum_are_refused_as_such():
    body = body_of(example())
    body["tensors"]["model.w"][0] = "float6"
    with pytest.raises(FormatError, match="float6"):
        read(signed(body))
    with pytest.raises(FormatError, match="md5"):
        checksum.checksum(b"", "md5")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'"text"',
        b'{"format": 1}',
        b"\xff\xfe",
        b"NaN",
    ],
)
def test_nonsense_with_a_valid_digest_is_refused(body):
    with pytest.raises(CorruptError, match="here/manifest"):
        read(signed(body))


@settings(max_examples=300)
@given(st.data())
def test_changed_fields_are_refused_or_harmless(data):
    """With a valid digest, whatever one field holds: a clear refusal, or a sound manifest."""
    body = copy.deepcopy(body_of(example()))
    *way, last = data.draw(st.sampled_from(places(body)))
    parent = body
    for key in way:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "remove"]))
    if action == "remove":
        del parent[last]
    else:
        parent[last] = data.draw(JSON_JUNK)
    try:
        manifest = read(signed(body))
    except StorageError:
        return
    check_sound(manifest)


def whole_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def check_sound(manifest: Manifest) -> None:
    """What the readers rely on."""
    assert whole_number(manifest.step)
    assert whole_number(manifest.world_size)
    assert manifest.world_size > 0
    assert isinstance(manifest.attempt, str)
    for file in manifest.files:
        for value in (file.data_start, file.data_nbytes, file.chunk_nbytes, file.header_checksum):
            assert whole_number(value)
        assert len(file.chunk_checksums) == -(-file.data_nbytes // file.chunk_nbytes)
        assert file.chunk_nbytes % 16 == 0, "an element must not lie across two chunks"
    for info in manifest.tensors.values():
        assert all(whole_number(v) for v in info.shape)
        assert sum(b.box.volume for b in info.boxes) == Box.full(info.shape).volume
        for b in info.boxes:
            assert all(whole_number(v) for v in (*b.box.offset, *b.box.extent, b.file, b.start))
            assert b.start % info.dtype.itemsize == 0
            end = b.start + b.box.volume * info.dtype.itemsize
            assert end <= manifest.files[b.file].data_nbytes
    assert all(name in manifest.tensors for name in manifest.aliases.values())
    for stored in manifest.objects.values():
        assert isinstance(stored, dict)
        assert list(stored) == ["all"] or isinstance(stored["ranks"], dict)
    assert isinstance(manifest.metrics, dict)
    assert isinstance(manifest.run, dict)
    assert isinstance(manifest.created, int | float)


def test_checksum_lists_pack():
    values = [0, 1, 0xFFFFFFFF, 0x01020304]
    assert checksum.unpack(checksum.pack(values)) == values
    for text in ("0", "0000000g", "+0000001", " 0000001", "0x000001", "0000_001"):
        with pytest.raises(FormatError):
            checksum.unpack(text)


def test_table_of_dtypes_fits_torch():
    for name, stored in _BY_NAME.items():
        assert getattr(torch, name) is stored.dtype
        assert 16 % stored.itemsize == 0
