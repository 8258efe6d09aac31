"""The erasure code once more: slow, in plain Python, from its definition; no table, no numpy."""

from collections.abc import Mapping, Sequence


def times(a: int, b: int) -> int:
    """The product in GF(2^8) modulo 0x11d, bit by bit."""
    result = 0
    for bit in range(8):
        if b >> bit & 1:
            result ^= a
        a = (a << 1) ^ (0x11D if a & 0x80 else 0)
    return result


def inverse(a: int) -> int:
    """What gives 1 with `a`."""
    return next(x for x in range(1, 256) if times(a, x) == 1)


def coefficients(k: int, m: int) -> list[list[int]]:
    """Those of the parity rows: XOR; P + Q; a Cauchy matrix, its first row and column ones."""
    if m <= 2:
        rows = [[1] * k]
        if m == 2:
            rows.append([1])
            while len(rows[1]) < k:
                rows[1].append(times(rows[1][-1], 2))
        return rows
    cauchy = [[inverse((k + i) ^ j) for j in range(k)] for i in range(m)]
    columns = [[times(row[j], inverse(cauchy[0][j])) for j in range(k)] for row in cauchy]
    return [[times(c, inverse(row[0])) for c in row] for row in columns]


def combined(factors: Sequence[int], rows: Sequence[bytes], n: int) -> bytes:
    """The sum of rows times factors."""
    result = bytearray(n)
    for factor, row in zip(factors, rows, strict=True):
        for i, byte in enumerate(row):
            result[i] ^= times(factor, byte)
    return bytes(result)


def encode(k: int, m: int, data: Sequence[bytes]) -> list[bytes]:
    """The parity rows."""
    return [combined(row, data, len(data[0])) for row in coefficients(k, m)]


def decode(k: int, m: int, parts: Mapping[int, bytes]) -> list[bytes]:
    """The data rows, by elimination on the first k parts themselves."""
    everything = [[int(i == j) for j in range(k)] for i in range(k)] + coefficients(k, m)
    have = sorted(parts)[:k]
    n = len(parts[have[0]])
    equations = [(list(everything[i]), bytes(parts[i])) for i in have]
    for column in range(k):
        at = next(r for r in range(column, k) if equations[r][0][column])
        equations[column], equations[at] = equations[at], equations[column]
        factors, row = equations[column]
        scale = inverse(factors[column])
        equations[column] = [times(scale, f) for f in factors], combined([scale], [row], n)
        for other in range(k):
            by = equations[other][0][column]
            if other != column and by:
                factors = [
                    f ^ times(by, p)
                    for f, p in zip(equations[other][0], equations[column][0], strict=True)
                ]
                row = combined([1, by], [equations[other][1], equations[column][1]], n)
                equations[other] = factors, row
    return [row for _, row in equations]
