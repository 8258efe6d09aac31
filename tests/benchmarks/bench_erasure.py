"""erasure: encoding and decoding of stripes on one core, beside raw ISA-L, peers and memcpy.

    python tests/benchmarks/bench_erasure.py [--mb 64] [--turns 7] [--block-kb 1024]

Data: random bytes, `--mb` in all, cut into k rows; m rows are lost in a decode, data rows as far as
there are. Raw ISA-L is its `ec_encode_data` on the same buffers, tables and pointers made before.
pyeclib and zfec are called as their users call them. Speeds are bytes of data over the CPU time of
the one thread; for a decode those of all data rows, too, though only what is lost is computed
(pyeclib also puts the rows together). Each variant is called once before its turn's call counts, so
that all find their data, code and memory in the same state; of short rows several calls count
together. Every result is compared with what it must be.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from timing import Goal, NotMeasured, Turns, in_turn, machine, publish_tables

from planaria.checkpoint.erasure import available_backends, libisal, make_codec
from planaria.checkpoint.erasure.matrices import chosen, parity_matrix, rebuild_matrix

SHAPES = [(k, m) for k in (4, 8) for m in (1, 2, 3, 4)]
RAW, PYECLIB, ZFEC, MEMCPY, NUMBA = "raw ISA-L", "pyeclib", "zfec", "memcpy", "numba"
PEERS = {
    RAW: "ec_encode_data through ctypes, one call for all of it",
    PYECLIB: "ECDriver(ec_type='isa_l_rs_cauchy'), bytes in, fragments out",
    ZFEC: "Encoder, Decoder; rows as bytes",
}


class Case:
    """One stripe, and everything that can be done with it.

    Args:
        k: Data rows.
        m: Parity rows.
        n: Bytes a row.
        calls: How many calls are timed together.
    """

    def __init__(self, k: int, m: int, n: int, calls: int = 1) -> None:
        self.k, self.m, self.n, self.calls = k, m, n, calls
        self.data = np.random.default_rng(k * m).integers(0, 256, (k, n), dtype=np.uint8)
        self.parity = make_codec(k, m, "numba").encode(self.data)
        self.lost = list(range(min(k, m)))  # data as far as there is
        self.whole = [*self.data, *self.parity]
        self.parts = {i: r for i, r in enumerate(self.whole) if i not in self.lost}
        self.out = np.empty((max(m, k), n), np.uint8)
        self.copy = np.empty_like(self.data)

    def encoders(self) -> dict[str, Callable[[], float]]:
        """Name -> encodes once, checks it, and returns seconds."""
        k, m = self.k, self.m
        out = self.out[:m]

        def ours(backend: str) -> Callable[[], float]:
            codec = make_codec(k, m, backend, threads=1)
            return lambda: self.timed(lambda: codec.encode(self.data, out), out, self.parity)

        def raw() -> float:
            return self.timed(lambda: call(*arguments), out, self.parity)

        variants = {NUMBA: ours("numba"), MEMCPY: self.memcpy}
        if "isal" in available_backends():
            call, *arguments = raw_isal(parity_matrix(k, m), list(self.data), list(out))
            variants = {"planaria": ours("isal"), RAW: raw} | variants
        return variants | {PYECLIB: self.pyeclib_encode, ZFEC: self.zfec_encode}

    def decoders(self) -> dict[str, Callable[[], float]]:
        """Name -> rebuilds what is lost once, checks it, and returns seconds."""
        k, m = self.k, self.m
        out = self.out[: len(self.lost)]
        expected = self.data[self.lost]
        wanted = dict(zip(self.lost, out, strict=True))

        def ours(backend: str) -> Callable[[], float]:
            codec = make_codec(k, m, backend, threads=1)
            return lambda: self.timed(lambda: codec.rebuild(self.parts, wanted), out, expected)

        def raw() -> float:
            return self.timed(lambda: call(*arguments), out, expected)

        variants = {NUMBA: ours("numba"), MEMCPY: self.memcpy}
        if "isal" in available_backends():
            have = chosen(k, set(self.parts))
            matrix = rebuild_matrix(k, m, have, tuple(self.lost))
            call, *arguments = raw_isal(matrix, [self.parts[i] for i in have], list(out))
            variants = {"planaria": ours("isal"), RAW: raw} | variants
        return variants | {PYECLIB: self.pyeclib_decode, ZFEC: self.zfec_decode}

    def timed(self, run: Callable[[], Any], out: np.ndarray, expected: np.ndarray) -> float:
        """CPU seconds of a call that must give something."""
        out[:] = 0
        seconds = self.cpu(run)
        assert np.array_equal(out, expected)
        return seconds

    def cpu(self, run: Callable[[], Any]) -> float:
        """CPU seconds of this thread that a call takes, after one that does not count."""
        run()
        started = time.thread_time()
        for _ in range(self.calls):
            run()
        return (time.thread_time() - started) / self.calls

    def memcpy(self) -> float:
        """CPU seconds of a copy of the data."""
        to, of, nbytes = self.copy.ctypes.data, self.data.ctypes.data, self.data.nbytes
        return self.cpu(lambda: ctypes.memmove(to, of, nbytes))

    def pyeclib_encode(self) -> float:
        driver, data = self._pyeclib(), self.data.tobytes()
        assert driver.decode(driver.encode(data)[self.m :]) == data
        return self.cpu(lambda: driver.encode(data))

    def pyeclib_decode(self) -> float:
        driver, data = self._pyeclib(), self.data.tobytes()
        fragments = driver.encode(data)
        left = [f for i, f in enumerate(fragments) if i not in self.lost]
        assert driver.decode(left) == data
        return self.cpu(lambda: driver.decode(left))

    def zfec_encode(self) -> float:
        encoder = self._zfec().Encoder(self.k, self.k + self.m)
        rows = [row.tobytes() for row in self.data]
        wanted = list(range(self.k, self.k + self.m))
        self._zfec_decoder()
        return self.cpu(lambda: encoder.encode(rows, wanted))

    def zfec_decode(self) -> float:
        return self.cpu(self._zfec_decoder())

    def _zfec_decoder(self) -> Callable[[], Any]:
        """What decodes the lost rows from what zfec itself encoded; checked once."""
        rows = [row.tobytes() for row in self.data]
        encoder = self._zfec().Encoder(self.k, self.k + self.m)
        whole = [*rows, *encoder.encode(rows, list(range(self.k, self.k + self.m)))]
        decoder = self._zfec().Decoder(self.k, self.k + self.m)
        left = [i for i in range(self.k + self.m) if i not in self.lost][: self.k]
        # It wants data rows at their own place.
        spare = [i for i in left if i >= self.k]
        order = [i if i in left else spare.pop(0) for i in range(self.k)]
        shares = [whole[i] for i in order]
        assert decoder.decode(shares, order) == rows
        return lambda: decoder.decode(shares, order)

    def _pyeclib(self) -> Any:
        try:
            from pyeclib.ec_iface import ECDriver
        except ImportError as error:
            raise NotMeasured(f"not installed: {error}") from error
        return ECDriver(k=self.k, m=self.m, ec_type="isa_l_rs_cauchy")

    def _zfec(self) -> Any:
        try:
            import zfec  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise NotMeasured(f"not installed: {error}") from error
        return zfec


def raw_isal(matrix: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]) -> list[Any]:
    """ISA-L's function and its arguments."""
    library = next(iter(libisal.libraries()))
    pointers = [(ctypes.c_void_p * len(a))(*[r.ctypes.data for r in a]) for a in (rows, out)]
    tables = ctypes.create_string_buffer(32 * matrix.size)
    m, k = matrix.shape
    library.ec_init_tables(k, m, matrix.tobytes(), tables)
    return [library.ec_encode_data, rows[0].size, k, m, tables, *pointers]


def row(case: Case, what: str, turns: Turns, beside: Turns) -> dict[str, Any]:
    """One line: our speed, and how many times that of the others it is."""
    nbytes = case.data.nbytes

    def times(name: str, of: str) -> float:
        return (beside if of in (PYECLIB, ZFEC) else turns).ratio(of, name)["median"]

    spread = turns.ratio(RAW, "planaria")
    return {
        "what": f"{what} {case.k}+{case.m}",
        "planaria GB/s": nbytes / turns.median("planaria") / 1e9,
        "x raw ISA-L": spread["median"], "min": spread["min"], "max": spread["max"],
        "x memcpy": times("planaria", MEMCPY),
        "x pyeclib": times("planaria", PYECLIB), "x zfec": times("planaria", ZFEC),
        "numba GB/s": nbytes / turns.median(NUMBA) / 1e9, "numba x memcpy": times(NUMBA, MEMCPY),
        "raw GB/s": nbytes / turns.median(RAW) / 1e9,
        "pyeclib GB/s": nbytes / beside.median(PYECLIB) / 1e9,
        "memcpy GB/s": nbytes / turns.median(MEMCPY) / 1e9,
    }  # fmt: skip


def worst(rows: list[dict[str, Any]], key: str, what: str = "") -> float:
    values = [r[key] for r in rows if r["what"].startswith(what)]
    return min(values) if all(v == v for v in values) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=64, help="data of a stripe, MiB")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peer-turns", type=int, default=2, help="of pyeclib and zfec")
    parser.add_argument("--block-kb", type=int, default=1024, help="rows of short calls, KiB")
    args = parser.parse_args()
    before = machine()
    failures: dict[str, str] = {}

    def measure(n: Callable[[int], int], suffix: str = "", calls: int = 1) -> list[dict[str, Any]]:
        rows = []
        for k, m in SHAPES:
            case = Case(k, m, n(k), calls)
            for what, variants in (("encode", case.encoders()), ("decode", case.decoders())):
                peers = {name: variants.pop(name) for name in (PYECLIB, ZFEC)}
                turns = in_turn(variants, args.turns)
                first = next(iter(variants))
                beside = in_turn({first: variants[first]} | peers, args.peer_turns)
                failures.update({f"{w} ({what} {k}+{m}{suffix})": why
                                 for w, why in beside.failures.items()})  # fmt: skip
                rows.append(row(case, what, turns, beside))
        return sorted(rows, key=lambda r: r["what"].startswith("decode"))

    long = measure(lambda k: (args.mb << 20) // k)
    short = measure(lambda k: args.block_kb << 10, ", short", calls=8)
    fallback = {m: worst(long, "numba x memcpy", f"encode 8+{m}") for m in (1, 2)}
    fallback = {m: min(v, worst(long, "numba x memcpy", f"encode 4+{m}"))
                for m, v in fallback.items()}  # fmt: skip
    publish_tables(
        "erasure",
        [
            (f"Stripes of {args.mb} MiB, one core, m rows lost in a decode (measured)", long),
            (f"Rows of {args.block_kb} KiB: what a call costs (measured)", short),
        ],
        vars(args),
        goals=[
            Goal("encode, times raw ISA-L, at worst", worst(long, "x raw ISA-L", "encode"), 0.9, 1),
            Goal("decode, times raw ISA-L, at worst", worst(long, "x raw ISA-L", "decode"), 0.9, 1),
            Goal(f"the same, rows of {args.block_kb} KiB", worst(short, "x raw ISA-L"), 0.9, 1),
            Goal("encode, times pyeclib's wrapper, at worst", worst(long, "x pyeclib", "enc"), 10),
            Goal("decode, times pyeclib's wrapper, at worst", worst(long, "x pyeclib", "dec"), 10),
            Goal("without ISA-L, m = 1: encode, times memcpy", fallback[1], 0.8),
            Goal("without ISA-L, m = 2: encode, times memcpy", fallback[2], 0.35),
        ],
        peers=PEERS,
        failures=failures,
        started=before,
    )


if __name__ == "__main__":
    main()
