"""One rank alone sees what several would see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core.collective import Ranks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON)
def test_values_come_back_as_they_are(value):
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.all_gather(value) == [value]
    assert ranks.gather(value) == [value]
    assert ranks.broadcast(value) == value


def test_values_are_json_as_between_processes():
    ranks = Ranks()
    assert ranks.broadcast({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}
    shared = [1]
    assert ranks.broadcast(shared) is not shared
    with pytest.raises(TypeError):
        ranks.all_gather({1, 2})


def test_a_maximum_over_one_rank():
    finish = Ranks().max_async([3, 1])
    assert finish() == [3, 1]


def test_closing_twice_is_harmless():
    ranks = Ranks()
    ranks.close()
    ranks.close()
    assert ranks.broadcast(1) == 1
