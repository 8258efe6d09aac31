"""Every codec gives back the same bits, whatever they are, and refuses what is not its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_blocks import FLOATS, drifted, equal, job, specials, stepped, weights

from planaria.errors import CorruptError, FormatError, PlanariaError
from planaria.rl_sync.bits import FORMATS, BitFormat
from planaria.rl_sync.codecs import exponent as exponent_codec
from planaria.rl_sync.codecs.bound import entropy_bound_bits
from planaria.rl_sync.codecs.registry import NAMES, all_codecs, decoder
from planaria.rl_sync.codecs.tables import TOTAL, read_tables, write_tables
from planaria.rl_sync.codecs.tokens import TOKENS, token_range, ulp_distance, ulp_move
from planaria.rl_sync.diff.scan import Changes, Scanner
from planaria.rl_sync.versions.manifest import content_hash

BF16 = FORMATS["bfloat16"]
ALL = list(FORMATS.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("density", [0.0, 0.004, 0.3, 1.0])
def test_blocks_come_back(name: str, fmt: BitFormat, density: float) -> None:
    base = weights(fmt, 5000)
    blocks = [job(fmt, base, stepped(fmt, base, density)), job(fmt, base, base.copy())]
    codec = all_codecs()[name]
    model, coded = codec.encode(blocks)
    for block, data in zip(blocks, coded, strict=True):
        back = decoder(name).decode(data, fmt, base, block.changes.size, model)
        assert equal(back, block.changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_every_special_to_every_special(name: str, fmt: BitFormat) -> None:
    kinds = specials(fmt)
    base, live = np.repeat(kinds, kinds.size), np.tile(kinds, kinds.size)
    block = job(fmt, base, live)
    model, (data,) = all_codecs()[name].encode([block])
    back = decoder(name).decode(data, fmt, base, block.changes.size, model)
    result = base.copy()
    result[back.pos] = back.new
    assert np.array_equal(result, live)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_any_bits_come_back(name: str, data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from(ALL))
    n = data.draw(st.integers(1, 300))
    draw = st.integers(0, (1 << 8 * fmt.width) - 1)
    base = np.array(data.draw(st.lists(draw, min_size=n, max_size=n)), fmt.unsigned)
    live = base.copy()
    for i, value in data.draw(st.dictionaries(st.integers(0, n - 1), draw)).items():
        live[i] = value
    block = job(fmt, base, live)
    model, (coded,) = all_codecs()[name].encode([block])
    assert equal(decoder(name).decode(coded, fmt, base, block.changes.size, model), block.changes)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(data=st.data())
def test_what_is_damaged_is_refused_or_decodes_to_a_block(name: str, data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from([BF16, FORMATS["float32"], FORMATS["float8_e4m3fn"]]))
    base = weights(fmt, 700)
    block = job(fmt, base, stepped(fmt, base, 0.05))
    model, (coded,) = all_codecs()[name].encode([block])
    parts = [bytearray(model), bytearray(coded)]
    for _ in range(data.draw(st.integers(1, 4))):
        part = parts[data.draw(st.integers(0, 1))]
        kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
        if kind == "flip" and part:
            part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del part[data.draw(st.integers(0, len(part))) :]
        else:
            part += data.draw(st.binary(max_size=8))
    count = data.draw(st.sampled_from([block.changes.size, 0, 1, 700, 1 << 40]))
    try:
        back = decoder(name).decode(bytes(parts[1]), fmt, base, count, bytes(parts[0]))
    except PlanariaError:
        return
    assert back.size == count
    assert not back.size or int(back.pos[-1]) < base.size
    assert (back.old == base[back.pos]).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(coded=st.binary(max_size=200), model=st.binary(max_size=60), count=st.integers(0, 50))
def test_noise_is_no_block(name: str, coded: bytes, model: bytes, count: int) -> None:
    base = weights(BF16, 64)
    try:
        back = decoder(name).decode(coded, BF16, base, count, model)
    except PlanariaError:
        return
    assert back.size == count


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(FormatError, match=r"'zip'.*newer"):
        decoder("zip")


def test_a_block_cut_short_says_so() -> None:
    base = weights(BF16, 3000)
    block = job(BF16, base, stepped(BF16, base, 0.1))
    model, (data,) = all_codecs()["exponent"].encode([block])
    with pytest.raises(CorruptError, match=r"cut short|does not end"):
        decoder("exponent").decode(data[:-4], BF16, base, block.changes.size, model)


def test_the_bytes_are_those_of_format_1() -> None:
    """A folder outlives the version that wrote it, and sites are not upgraded on one day."""
    found = {}
    mixed = np.arange(30_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    for fmt in (BF16, FORMATS["float32"], FORMATS["float8_e4m3fn"]):
        base = mixed.astype(fmt.unsigned)
        live = base.copy()
        live[::97] += 1
        live[5::331] ^= 77
        for name in ("gap_raw", "gap_ulp", "exponent"):
            model, (data,) = all_codecs()[name].encode([job(fmt, base, live)])
            found[fmt.name, name] = content_hash(model + data)[:8]
    assert list(found.values()) == [
        "39595f7b", "2a361c9b", "aee018b5", "c8aa3345", "2b1a8627", "9f008466", "bfb72d0b",
        "60eb49f7", "023721a3",
    ]  # fmt: skip


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_ulp_distances(fmt: BitFormat) -> None:
    kinds = specials(fmt)
    old, new = np.repeat(kinds, kinds.size), np.tile(kinds, kinds.size)
    sign = 1 << (8 * fmt.width - 1)
    distance, back = np.empty(old.size, np.uint64), np.empty_like(old)
    ulp_distance(old, new, sign, distance)
    assert ulp_move(old, distance, sign, back)
    assert np.array_equal(back, new)
    zeros = np.array([0, sign], fmt.unsigned)
    ulp_distance(zeros, zeros[::-1].copy(), sign, distance[:2])
    assert distance[:2].tolist() == [1, 2]  # one down, one up


def test_tokens_cover_every_integer_once() -> None:
    at = 0
    for token in range(TOKENS):
        first, end = token_range(token)
        assert first == at
        at = end
    assert at >= 1 << 34


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10**6), min_size=TOKENS, max_size=TOKENS))
def test_tables_add_up_and_have_a_code_for_what_occurs(counts: list[int]) -> None:
    row = np.array([counts, [0] * TOKENS])
    tables = read_tables(write_tables(row), 2)
    assert int(tables.freq[0].sum()) in ((TOTAL, 0) if not any(counts) else (TOTAL,))
    assert (tables.freq[0][row[0] > 0] > 0).all()
    assert not tables.used[1]


def test_the_smallest_codec_is_near_the_bound() -> None:
    base, live = drifted(1 << 20)
    cuts = [slice(i, i + (1 << 18)) for i in range(0, 1 << 20, 1 << 18)]
    jobs = [job(BF16, base[c], live[c]) for c in cuts]
    model, coded = all_codecs()["exponent"].encode(jobs)
    bits = 8 * (len(model) + sum(map(len, coded)))
    bound = entropy_bound_bits(jobs)
    assert bits <= 1.15 * bound
    assert bound < 0.75 * entropy_bound_bits(jobs, conditional=False)


def test_estimates_are_near() -> None:
    base, live = drifted(1 << 18)
    block = job(BF16, base, live)
    for name, codec in all_codecs().items():
        codec.encode([block])  # now it has seen such weights
        guess = codec.size(BF16, base.size, block.changes)
        model, (coded,) = codec.encode([block])
        assert 0.8 < guess / (len(model) + len(coded)) < 1.25, name


# Sabotage: what the conformance suite above must notice.


@pytest.mark.parametrize("broken", ["zigzag", "class", "last"])
def test_the_suite_notices_a_broken_codec(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = BF16
    base = weights(fmt, 5000)
    block = job(fmt, base, stepped(fmt, base, 0.05))
    codec = all_codecs()["exponent"]
    model, (data,) = codec.encode([block])
    if broken == "zigzag":
        real = exponent_codec.ulp_move
        monkeypatch.setattr(
            exponent_codec, "ulp_move",
            lambda old, z, sign, new: real(old, z ^ (z > 20), sign, new),
        )  # fmt: skip
    elif broken == "class":
        base = base ^ np.uint16(1 << 8)  # old values that are not the sender's
    else:
        data = data[:-2]
    try:
        back = codec.decode(data, fmt, base, block.changes.size, model)
    except CorruptError:
        return
    assert not equal(back, block.changes)


def test_a_scan_by_numbers_would_be_noticed() -> None:
    import torch

    from planaria.rl_sync.bits import tensor_of

    base = np.array([0x0000, 0x7FC0, 0x3F80], np.uint16)
    live = np.array([0x8000, 0x7FC1, 0x3F80], np.uint16)
    exact = Scanner().scan([live], base)
    assert exact.pos.tolist() == [0, 1]
    numbers = [tensor_of(b).view(torch.bfloat16) for b in (base, live)]
    assert torch.nonzero(numbers[0] != numbers[1]).flatten().tolist() != exact.pos.tolist()


@settings(max_examples=30)
@given(st.data())
def test_scan_finds_exactly_the_differences(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 4]))
    sizes = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    base = rng.integers(0, 255, sum(sizes)).astype(f"u{width}")
    live = base.copy()
    live[rng.random(base.size) < data.draw(st.sampled_from([0, 0.01, 0.5, 1]))] ^= 1
    pieces = np.split(live, np.cumsum(sizes)[:-1])
    found = Scanner().scan(pieces, base)
    assert np.array_equal(found.pos, np.flatnonzero(live != base))
    assert np.array_equal(found.new, live[found.pos])
    assert np.array_equal(found.old, base[found.pos])


def test_scan_grows_its_room() -> None:
    base = np.zeros(200_000, np.uint16)
    found = Scanner().scan([base + np.uint16(1)], base)
    assert found.size == base.size
    assert isinstance(found, Changes)
