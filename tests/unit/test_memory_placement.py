"""Groups and stripes: every byte once, no two parts of a stripe on one node, domains spread."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.checkpoint.memory.placement import PAGE, Stripes, make_groups
from planaria.errors import ConfigError


@st.composite
def stripes(draw: st.DrawFn) -> Stripes:
    nodes = draw(st.integers(1, 20))
    losses = draw(st.integers(0, nodes - 1))
    lengths = draw(st.lists(st.integers(0, 40 * PAGE), min_size=nodes, max_size=nodes))
    return Stripes(nodes, losses, lengths)


def holds(layout: Stripes) -> None:
    """What must be true of every layout; also what the sabotaged ones below fail."""
    for stripe in range(layout.nodes):
        nodes = layout.part_nodes(stripe)
        assert sorted(nodes) == list(range(layout.nodes)), "a part a node, each on its own"
        assert len(layout.data_nodes(stripe)) == layout.k
        assert nodes[layout.k :] == layout.parity_nodes(stripe)
    for node, length in enumerate(layout.lengths):
        for i, stripe in enumerate(layout.parity_stripes(node)):
            assert layout.parity_nodes(stripe)[i] == node
        covered = 0
        for chunk, stripe in enumerate(layout.data_stripes(node)):
            assert node in layout.data_nodes(stripe)
            assert layout.data_offset(node, stripe) == chunk * layout.chunk_nbytes
            offset, nbytes = layout.data_offset(node, stripe), layout.data_nbytes(node, stripe)
            if nbytes:
                assert offset == covered, "every byte once, in order"
                assert layout.locate(node, offset, nbytes) == [(stripe, 0, nbytes)]
            covered += nbytes
        assert covered == length, "every byte"


@given(stripes())
def test_every_byte_lies_in_one_chunk_and_every_part_on_its_own_node(layout: Stripes) -> None:
    holds(layout)


@given(stripes(), st.data())
def test_any_range_is_found(layout: Stripes, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, layout.nodes - 1))
    offset = data.draw(st.integers(0, layout.lengths[node]))
    nbytes = data.draw(st.integers(0, layout.lengths[node] - offset))
    found = []
    for part in layout.locate(node, offset, nbytes):
        at = layout.data_offset(node, part.stripe) + part.start
        assert part.nbytes >= 1
        assert part.start + part.nbytes <= layout.chunk_nbytes
        found += [at, at + part.nbytes]
    if nbytes:
        assert found[0] == offset
        assert found[-1] == offset + nbytes
        assert found[1:-1:2] == found[2:-1:2], "no gap, no overlap"
    else:
        assert not found


@given(stripes())
def test_parity_takes_m_of_k(layout: Stripes) -> None:
    """Each node stores m chunks beside its image: 1 + m / k, up to the rounding of a chunk."""
    longest = max(layout.lengths)
    parity = layout.m * layout.chunk_nbytes
    assert parity >= longest * layout.m / layout.k
    assert parity < (longest / layout.k + PAGE) * layout.m or not layout.m


def test_a_layout_that_is_known() -> None:
    layout = Stripes(4, 2, [5 * PAGE, 0, 1, 8 * PAGE])
    assert layout.chunk_nbytes == 4 * PAGE
    assert [layout.part_nodes(s) for s in range(4)] == [
        [2, 3, 0, 1], [0, 3, 1, 2], [0, 1, 2, 3], [1, 2, 3, 0],
    ]  # fmt: skip
    assert layout.locate(0, 4 * PAGE - 1, 2) == [(1, 4 * PAGE - 1, 1), (2, 0, 1)]
    with pytest.raises(ConfigError, match="holds parity"):
        layout.data_offset(0, 0)
    with pytest.raises(ConfigError, match="not within"):
        layout.locate(2, 0, 2)


@pytest.mark.parametrize(
    ("nodes", "losses", "lengths"),
    [
        (0, 0, []),
        (2, 2, [1, 1]),
        (2, -1, [1, 1]),
        (2, 1, [1]),
        (2, 1, [1, -1]),
        (256, 1, [0] * 256),
    ],
)
def test_what_makes_no_sense_is_refused(nodes: int, losses: int, lengths: list[int]) -> None:
    with pytest.raises(ConfigError):
        Stripes(nodes, losses, lengths)


def test_a_layout_with_two_parts_on_a_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Stripes(5, 2, [100 * PAGE] * 5)
    holds(layout)
    monkeypatch.setattr(Stripes, "parity_nodes", lambda self, s: [s, (s + 2) % self.nodes])
    with pytest.raises(AssertionError):
        holds(layout)


def test_a_byte_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Stripes(4, 1, [10 * PAGE] * 4)
    layout.chunk_nbytes -= PAGE
    with pytest.raises(AssertionError):
        holds(layout)


domain = st.sampled_from(["", "a", "b", "c", "d"])


@given(st.lists(domain, max_size=60), st.integers(1, 20), st.integers(0, 4))
def test_groups_are_even_and_spread(domains: list[str], group_size: int, losses: int) -> None:
    groups = make_groups(domains, group_size, losses)
    assert sorted(node for group in groups for node in group) == list(range(len(domains)))
    if not domains:
        return
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert all(group == sorted(group) for group in groups)
    if min(sizes) <= losses:
        assert len(groups) == 1, "too few nodes for these losses: all of them back each other up"
    if max(sizes) > group_size:
        assert len(domains) // (len(groups) + 1) < losses + 1, "one more would be too small"
    counts = Counter(domains)
    for group in groups:
        for name, there in Counter(domains[node] for node in group).items():
            assert not name or there <= -(-counts[name] // len(groups)), "spread as far as can be"


def test_groups_of_neighbours_where_nothing_is_known() -> None:
    assert make_groups([""] * 5, 2, 1) == [[0, 1], [2, 3, 4]]
    assert make_groups(["x"] * 4, 2, 1) == [[0, 1], [2, 3]]
    assert make_groups(["a", "b", "c", "d"], 2, 1) == [[0, 1], [2, 3]]
    assert make_groups(["a", "a", "b", "b"], 2, 1) == [[0, 2], [1, 3]]
    assert make_groups(["a"], 16, 2) == [[0]]
    assert make_groups([""] * 5, 4, 2) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("size", "losses"), [(0, 0), (256, 1), (4, -1)])
def test_group_sizes_out_of_range_are_refused(size: int, losses: int) -> None:
    with pytest.raises(ConfigError):
        make_groups(["a"], size, losses)


def test_a_hundred_thousand_nodes_in_racks() -> None:
    """Quadratic work would take hours here."""
    nodes, rack = 100_000, 40
    groups = make_groups([f"rack-{i // rack}" for i in range(nodes)], 16, 2)
    assert len(groups) == nodes // 16
    assert sorted(node for group in groups for node in group) == list(range(nodes))
    for group in groups:
        assert len({node // rack for node in group}) == 16, "each node in a rack of its own"
        assert Stripes(16, 2, [rack * PAGE] * 16).k == 14
