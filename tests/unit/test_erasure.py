"""What every backend of the erasure codes must do, byte for byte alike."""

import threading
from collections.abc import Iterator
from typing import Any

import gf_reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planaria.checkpoint.erasure import Codec, available_backends, isal, make_codec, matrices
from planaria.errors import ConfigError, CorruptError, NotSupportedError

Array = np.ndarray


@pytest.fixture(params=["isal", "numba", "torch"], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in available_backends():
        pytest.skip(f"{request.param} is not here")
    return request.param


def random_rows(rng: np.random.Generator, rows: int, n: int) -> Array:
    return rng.integers(0, 256, (rows, n), dtype=np.uint8)


def shifted(rows: Array, shift: int) -> list[Array]:
    """The same rows, each in a buffer of its own that begins at an odd address."""
    copies = []
    for i, row in enumerate(rows):
        buffer = np.empty(row.size + 64, np.uint8)
        start = (shift + 3 * i) % 64
        buffer[start : start + row.size] = row
        copies.append(buffer[start : start + row.size])
    return copies


class Guarded:
    """Buffers to write to, of which it is noticed when somebody writes beside them."""

    def __init__(self, rows: int, n: int, shift: int) -> None:
        self.whole = np.full((rows, n + 128), 0xA5, np.uint8)
        self.start, self.n = 17 + shift, n
        self.rows = [row[self.start : self.start + n] for row in self.whole]

    def intact(self) -> bool:
        around = np.delete(self.whole, np.s_[self.start : self.start + self.n], axis=1)
        return bool((around == 0xA5).all())


# Around the widths of vectors, of the blocks of the kernels and of what a thread gets.
lengths = st.one_of(
    st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 8192 + 65, 2 * 4096 + 1])
)
relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(
    k=st.integers(1, 10), m=st.integers(1, 5), n=lengths, seed=st.integers(0, 999), data=st.data()
)
def test_any_losses_are_decoded(
    backend: str, k: int, m: int, n: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    codec = make_codec(k, m, backend)
    rows = random_rows(rng, k, n)
    out = Guarded(m, n, seed % 32)
    assert codec.encode(shifted(rows, seed), out=out.rows) is out.rows
    assert out.intact()
    parity = np.array(out.rows).reshape(m, n)
    if n <= 64:
        assert [row.tobytes() for row in parity] == gf_reference.encode(
            k, m, [row.tobytes() for row in rows]
        )
    whole = np.concatenate([rows, parity])
    lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m))
    order = data.draw(st.permutations([i for i in range(k + m) if i not in lost]))
    parts = dict(zip(order, shifted(whole[list(order)], seed), strict=True))
    assert np.array_equal(codec.decode(parts), rows)
    wanted = data.draw(st.lists(st.integers(0, k + m - 1), unique=True))
    buffers = Guarded(len(wanted), n, seed % 16)
    codec.rebuild(parts, dict(zip(wanted, buffers.rows, strict=True)))
    assert buffers.intact()
    assert all(np.array_equal(row, whole[i]) for i, row in zip(wanted, buffers.rows, strict=True))


@relaxed
@given(
    k=st.integers(1, 8), m=st.integers(1, 4), n=lengths, seed=st.integers(0, 999), data=st.data()
)
def test_changes_are_brought_up_to_date(
    backend: str, k: int, m: int, n: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    codec = make_codec(k, m, backend)
    rows = random_rows(rng, k, n)
    parity = Guarded(m, n, seed % 32)
    codec.encode(rows, out=parity.rows)
    # One row, by itself.
    index = data.draw(st.integers(0, k - 1))
    new = random_rows(rng, 1, n)[0]
    codec.update(parity.rows, index, rows[index], new)
    rows[index] = new
    assert np.array_equal(parity.rows, np.asarray(codec.encode(rows)))
    # Some spans, in any rows.
    edges = sorted(data.draw(st.lists(st.integers(0, n), min_size=4, max_size=4)))
    spans = [(edges[0], edges[1]), (edges[2], edges[3])]
    before = np.array(parity.rows).reshape(m, n)
    changed = rows.copy()
    for start, stop in spans:
        changed[:, start:stop] = random_rows(rng, k, stop - start)
    codec.encode_spans(changed, parity.rows, spans)
    assert np.array_equal(parity.rows, np.asarray(codec.encode(changed)))
    assert parity.intact()
    # Elsewhere nothing is written, right or wrong.
    codec.encode_spans(random_rows(rng, k, n), parity.rows, [(n, n)])
    assert np.array_equal(parity.rows, np.asarray(codec.encode(changed)))
    assert n == 0 or before.shape == (m, n)


@relaxed
@given(
    k=st.integers(1, 6), m=st.integers(1, 4), n=st.integers(0, 200), seed=st.integers(0, 999),
    data=st.data(),
)  # fmt: skip
def test_short_rows_end_in_zeros(
    backend: str, k: int, m: int, n: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    codec = make_codec(k, m, backend)
    ends = data.draw(st.lists(st.integers(0, n), min_size=k, max_size=k))
    rows = random_rows(rng, k, n)
    for row, end in zip(rows, ends, strict=True):
        row[end:] = 0
    short = [row[:end] for row, end in zip(rows, ends, strict=True)]
    parity = np.full((m, n), 0xEE, np.uint8)
    codec.encode(short, out=parity)
    assert np.array_equal(parity, np.asarray(codec.encode(rows)))
    lost = data.draw(st.sets(st.integers(0, k + m - 1), min_size=m, max_size=m))
    parts = {i: row for i, row in enumerate([*short, *parity]) if i not in lost}
    decoded = np.full((k, n), 0xEE, np.uint8)
    codec.decode(parts, out=decoded)
    assert np.array_equal(decoded, rows)
    update = parity.copy()
    codec.update(update, 0, short[0], b"")
    rows[0] = 0
    assert np.array_equal(update, np.asarray(codec.encode(rows)))


# Parity of the rows "0123", "4567" and "89ab". Nodes of different versions may share a stripe.
KNOWN = {
    (3, 1): ["3c3d6566"],
    (3, 2): ["3c3d6566", "b8bfc7c8"],
    (3, 3): ["3c3d6566", "37a17141", "065b4dab"],
}


@pytest.mark.parametrize("shape", sorted(KNOWN))
def test_known_bytes(backend: str, shape: tuple[int, int]) -> None:
    parity = np.asarray(make_codec(*shape, backend).encode([b"0123", b"4567", b"89ab"]))
    assert [row.tobytes().hex() for row in parity] == KNOWN[shape]


def test_buffers_of_any_kind(backend: str) -> None:
    codec = make_codec(3, 2, backend)
    rows = [b"0123", bytearray(b"4567"), memoryview(b"x89aby")[1:5]]
    parity = [bytearray(4), memoryview(bytearray(4))]
    codec.encode(rows, out=parity)
    assert [bytes(row).hex() for row in parity] == KNOWN[3, 2]
    assert bytes(np.asarray(codec.decode({3: parity[0], 1: rows[1], 4: parity[1]}))) == (
        b"0123456789ab"
    )


def test_long_rows_on_several_threads(backend: str) -> None:
    n = (1 << 20) + 3
    rows = random_rows(np.random.default_rng(0), 3, n)
    alone = np.asarray(make_codec(3, 2, backend, threads=1).encode(rows))
    assert np.array_equal(alone[0], rows[0] ^ rows[1] ^ rows[2])
    for threads in (2, 3, 8, "auto"):
        codec = make_codec(3, 2, backend, threads=threads)  # pyright: ignore[reportArgumentType]
        assert np.array_equal(alone, np.asarray(codec.encode(rows)))
        parts = {0: rows[0], 3: alone[0], 4: alone[1]}
        assert np.array_equal(rows, np.asarray(codec.decode(parts)))


def test_longer_rows_than_the_library_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    if "isal" not in available_backends():
        pytest.skip("isal is not here")
    rows = random_rows(np.random.default_rng(0), 3, 10_000)
    codec = make_codec(3, 3, "isal")
    expected = codec.encode(rows)
    monkeypatch.setattr(isal, "_LONGEST", 999)
    assert np.array_equal(codec.encode(rows), expected)
    codec.update(expected, 1, rows[1], rows[0])
    rows[1] = rows[0]
    assert np.array_equal(codec.encode(rows), expected)


def test_many_threads_share_a_codec(backend: str) -> None:
    codec = make_codec(4, 2, backend)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rows = random_rows(np.random.default_rng(seed), 4, 5000 + seed)
        for lost in range(4):
            parity = codec.encode(rows)
            parts = {i: row for i, row in enumerate([*rows, *parity]) if i not in (lost, 5)}
            if not np.array_equal(np.asarray(codec.decode(parts)), rows):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_too_few_parts(backend: str) -> None:
    codec = make_codec(4, 2, backend)
    with pytest.raises(CorruptError, match="3 of 6 parts are left; 4 are needed"):
        codec.decode(dict.fromkeys(range(3), b"12"))
    with pytest.raises(CorruptError):
        codec.rebuild({}, {0: bytearray(2)})


def bad_calls() -> Iterator[tuple[str, str, Any]]:
    good = [b"1234"] * 3
    out = [bytearray(4), bytearray(4)]
    both = bytearray(6)
    yield "rows", "must be 3 rows, not 2", lambda c: c.encode(good[:2])
    yield "outputs", "must be 2 rows, not 1", lambda c: c.encode(good, out=out[:1])
    yield "dtype", "uint8", lambda c: c.encode(np.zeros((3, 4), np.int8))
    yield "rank", "uint8", lambda c: c.encode(np.zeros((3, 4, 4), np.uint8))
    yield "strided", "contiguous", lambda c: c.encode(np.zeros((3, 8), np.uint8)[:, ::2])
    yield "no buffer", "no buffer", lambda c: c.encode(["a", "b", "c"])
    yield "read-only", "written to", lambda c: c.encode(good, out=[b"1234", b"1234"])
    yield "lengths", "differ in length", lambda c: c.encode(good, out=[bytearray(4), bytearray(5)])
    yield "longer", "has 4 bytes", lambda c: c.encode(good, out=[bytearray(3), bytearray(3)])
    yield "index", "no rows", lambda c: c.decode(dict.fromkeys((0, 1, 5), b"1234"))
    yield "negative", "no rows", lambda c: c.rebuild(dict(enumerate(good)), {-1: out[0]})
    yield "copied", "its buffer 3", lambda c: c.rebuild(dict(enumerate(good)), {0: bytearray(3)})
    yield "update", "no data row 3", lambda c: c.update(out, 3, b"1234", b"1234")
    yield "span", "outside", lambda c: c.encode_spans(good, out, [(2, 5)])
    yield "backwards", "outside", lambda c: c.encode_spans(good, out, [(3, 2)])
    yield "in place", "overlaps", lambda c: c.encode([both, *good[1:]], out=[both, bytearray(6)])
    yield "overlap", "overlaps", lambda c: c.encode(
        good, out=[memoryview(both)[:4], memoryview(both)[2:]]
    )  # fmt: skip


@pytest.mark.parametrize(("text", "call"), [pytest.param(t, c, id=i) for i, t, c in bad_calls()])
def test_bad_calls(backend: str, text: str, call: Any) -> None:
    with pytest.raises(ConfigError, match=text):
        call(make_codec(3, 2, backend))


@pytest.mark.parametrize(
    ("k", "m"), [(0, 1), (1, 0), (-1, 2), (254, 2), (1, 255), (1.0, 1), (True, 1)]
)
def test_bad_shapes(k: Any, m: Any) -> None:
    with pytest.raises(ConfigError):
        make_codec(k, m)


@pytest.mark.parametrize("more", [{"backend": "gpu"}, {"threads": 0}, {"threads": "all"}])
def test_bad_options(more: Any) -> None:
    with pytest.raises(ConfigError):
        make_codec(2, 1, **more)


def test_a_wrong_coefficient_is_noticed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: what is encoded by another matrix than it is decoded by comes out wrong."""
    rows = random_rows(np.random.default_rng(0), 4, 100)
    codec = make_codec(4, 3, backend)
    flipped = codec.matrix.copy()
    flipped[2, 1] ^= 1
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "matrix", flipped)
        parity = np.asarray(codec.encode(rows))
    assert not np.array_equal(parity, np.asarray(codec.encode(rows)))
    parts = {0: rows[0], 3: rows[3], 4: parity[0], 6: parity[2]}
    assert not np.array_equal(np.asarray(codec.decode(parts)), rows)
    assert [row.tobytes() for row in parity] != gf_reference.encode(
        4, 3, [row.tobytes() for row in rows]
    )


@pytest.mark.parametrize(("k", "m", "lost"), [(4, 1, [2]), (5, 2, [0, 4]), (4, 3, [1, 2, 3])])
def test_decoded_as_plain_python_does(backend: str, k: int, m: int, lost: list[int]) -> None:
    rows = random_rows(np.random.default_rng(1), k, 33)
    codec = make_codec(k, m, backend)
    parity = np.asarray(codec.encode(rows))
    parts = {i: row for i, row in enumerate([*rows, *parity]) if i not in lost}
    plain = gf_reference.decode(k, m, {i: row.tobytes() for i, row in parts.items()})
    assert [row.tobytes() for row in np.asarray(codec.decode(parts))] == plain
    assert plain == [row.tobytes() for row in rows]


def test_backends_are_tried_before_they_are_trusted(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: a backend that computes in another field is refused."""
    from planaria.checkpoint.erasure import backend as backends

    made = make_codec(2, 1, backend)._backend
    monkeypatch.setattr(backends, "multiply", lambda a, b: np.zeros_like(b))
    with pytest.raises(NotSupportedError, match="another field"):
        backends.check(made)


def test_matrices_are_kept_and_read_only() -> None:
    matrix = matrices.parity_matrix(4, 2)
    assert matrices.parity_matrix(4, 2) is matrix
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 7
