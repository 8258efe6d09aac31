"""The field and the matrices of the erasure codes, against plain Python and by exhaustion."""

from itertools import combinations

import gf_reference
import numpy as np
import pytest

from planaria.checkpoint.erasure import field, matrices
from planaria.errors import ConfigError


def test_products_and_inverses() -> None:
    table = field.products()
    assert all(table[a, b] == gf_reference.times(a, b) for a in range(256) for b in range(256))
    assert field.inverses()[0] == 0
    assert all(table[a, field.inverses()[a]] == 1 for a in range(1, 256))
    assert [field.power_of_two(i) for i in (0, 1, 8, 255)] == [1, 2, 0x1D, 1]


def test_matrices_are_inverted() -> None:
    rng = np.random.default_rng(0)
    tried = 0
    for n in (1, 2, 3, 7, 40):
        matrix = rng.integers(0, 256, (n, n), dtype=np.uint8)
        matrix[0, 0] = 0 if n > 1 else 3  # the first pivot must be looked for
        try:
            inverse = field.invert(matrix)
        except ConfigError:  # about one in 256
            continue
        tried += 1
        assert np.array_equal(field.multiply(matrix, inverse), np.eye(n))
    assert tried >= 3
    with pytest.raises(ConfigError, match="no inverse"):
        field.invert(np.array([[1, 2], [1, 2]], np.uint8))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (5, 1), (4, 2), (9, 2), (1, 3), (4, 3), (6, 5)])
def test_parity_matrix_is_as_defined(k: int, m: int) -> None:
    assert matrices.parity_matrix(k, m).tolist() == gf_reference.coefficients(k, m)


@pytest.mark.parametrize(
    ("k", "m"), [(k, m) for k in (1, 2, 3, 5, 8) for m in (1, 2, 3, 4)] + [(3, 7)]
)
def test_any_k_rows_give_all_others(k: int, m: int) -> None:
    whole = np.concatenate([np.eye(k, dtype=np.uint8), matrices.parity_matrix(k, m)])
    for have in combinations(range(k + m), k):
        wanted = tuple(i for i in range(k + m) if i not in have)
        found = matrices.rebuild_matrix(k, m, have, wanted)
        assert np.array_equal(field.multiply(found, whole[list(have)]), whole[list(wanted)])


@pytest.mark.parametrize(("k", "m"), [(253, 2), (252, 3), (200, 55), (128, 127), (1, 254)])
def test_largest_codes(k: int, m: int) -> None:
    rng = np.random.default_rng(k)
    whole = np.concatenate([np.eye(k, dtype=np.uint8), matrices.parity_matrix(k, m)])
    assert whole[k].tolist() == [1] * k, "the first parity is the XOR"
    for turn in range(3):
        # At first as many data rows as can be, then any.
        lost = range(min(k, m)) if turn == 0 else rng.choice(k + m, m, replace=False)
        wanted = tuple(sorted(int(i) for i in lost))
        have = matrices.chosen(k, set(range(k + m)) - set(wanted))
        found = matrices.rebuild_matrix(k, m, have, wanted)
        assert np.array_equal(field.multiply(found, whole[list(have)]), whole[list(wanted)])
