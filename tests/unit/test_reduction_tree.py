"""The tree of a sum and the assignment of its leaves: pure functions."""

from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic.reduction.assignment import Assignment, assign, contiguous
from planaria.elastic.reduction.partial import plan_slots
from planaria.elastic.reduction.tree import Node, additions, complete_nodes, cover, root
from planaria.errors import ConfigError


def test_the_tree_of_five_leaves() -> None:
    assert root(5).children() == (Node(0, 3), Node(3, 5))
    adds = [(a.node, a.left, a.right) for a in additions(5, [Node(i, i + 1) for i in range(5)])]
    assert adds == [
        (Node(0, 2), Node(0, 1), Node(1, 2)),
        (Node(0, 3), Node(0, 2), Node(2, 3)),
        (Node(3, 5), Node(3, 4), Node(4, 5)),
        (Node(0, 5), Node(0, 3), Node(3, 5)),
    ]


@given(st.integers(1, 200), st.data())
def test_complete_nodes_are_exactly_the_leaves_held(leaves: int, data: st.DataObject) -> None:
    held = data.draw(st.sets(st.integers(0, leaves - 1)))
    nodes = complete_nodes(leaves, held)
    assert [leaf for n in nodes for leaf in range(n.start, n.stop)] == sorted(held)
    # None could be larger: no two of them are siblings.
    pairs = {(a, b) for a in nodes for b in nodes if a < b}
    assert not any(Node(a.start, b.stop).size > 1 and a.stop == b.start
                   and Node(a.start, b.stop) in reached(leaves) for a, b in pairs)  # fmt: skip


@cache
def reached(leaves: int) -> frozenset[Node]:
    """All nodes of a tree."""
    found, todo = set(), [root(leaves)]
    while todo:
        node = todo.pop()
        found.add(node)
        if node.size > 1:
            todo.extend(node.children())
    return frozenset(found)


@pytest.mark.parametrize(
    "nodes",
    [
        [Node(0, 3)],
        [Node(0, 3), Node(3, 6), Node(3, 6)],
        [Node(0, 3), Node(3, 6), Node(0, 2)],
        [Node(0, 4), Node(4, 6)],
    ],
)
def test_what_does_not_cover_the_tree_is_refused(nodes: list[Node]) -> None:
    with pytest.raises(ConfigError, match=r"leaf|nodes"):
        cover(6, nodes)


@given(st.integers(1, 8), st.integers(0, 200), st.integers(0, 3))
def test_ranks_are_balanced(world: int, more: int, slack: int) -> None:
    leaves = world + more
    found = assign(leaves, world, slack=slack)
    assert sorted(leaf for r in range(world) for leaf in found.leaves_of(r)) == list(range(leaves))
    assert found.longest <= -(-leaves // world) + slack
    assert all(found.nodes)
    assert found.sent >= found.least_sent - 1e-9
    assert all(found.owners[leaf] == r for r in range(world) for leaf in found.leaves_of(r))
    # The largest nodes there are, else more would be sent than needed.
    for own, rank in zip(found.nodes, range(world), strict=True):
        assert sorted(own) == complete_nodes(leaves, found.leaves_of(rank))


@given(st.integers(1, 8), st.integers(0, 200))
def test_never_more_is_sent_than_by_runs_of_leaves(world: int, more: int) -> None:
    leaves = world + more
    found, plain = assign(leaves, world), contiguous(leaves, world)
    assert found.longest <= plain.longest
    assert found.sent <= plain.sent + 1e-9 or found.longest < plain.longest


def least_nodes(leaves: int, world: int) -> int:
    """The fewest nodes of any balanced assignment, by trying all."""
    most, best = -(-leaves // world), leaves
    for owners in product(range(world), repeat=leaves):
        own = [[leaf for leaf, r in enumerate(owners) if r == rank] for rank in range(world)]
        if all(1 <= len(o) <= most for o in own):
            best = min(best, sum(len(complete_nodes(leaves, o)) for o in own))
    return best


@pytest.mark.parametrize(
    ("leaves", "world"), [(4, 3), (5, 2), (6, 2), (7, 2), (7, 3), (8, 2), (8, 3), (6, 4), (5, 4)]
)
def test_as_few_nodes_as_there_can_be(leaves: int, world: int) -> None:
    found = sum(map(len, assign(leaves, world).nodes))
    assert found == least_nodes(leaves, world)


def test_two_four_and_eight_ranks_send_the_least() -> None:
    for leaves in range(8, 65):
        for world in (1, 2, 4, 8):
            if leaves % world == 0:
                assert assign(leaves, world).volume == 1.0, (leaves, world)
    # What a bit of slack buys: 32 leaves on 3 ranks.
    assert assign(32, 3, slack=1).sent < assign(32, 3).sent


def test_more_ranks_than_leaves_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 leaves cannot keep 4 ranks busy"):
        assign(3, 4)
    with pytest.raises(ConfigError, match="no rank holds leaf 0"):
        Assignment(1, ((), ()))


def test_idle_ranks_get_nothing() -> None:
    found = assign(8, 5, idle=(1, 4))
    assert found.nodes[1] == found.nodes[4] == ()
    assert [own for own in found.nodes if own] == list(assign(8, 3).nodes)
    assert found.balance == assign(8, 3).balance


@pytest.mark.parametrize("direct", [True, False])
def test_few_sums_are_open_at_a_time(direct: bool) -> None:
    for world in range(1, 9):
        for leaves in range(world, 130, 3):
            found = assign(leaves, world)
            for own in found.nodes:
                plan = plan_slots(own, direct=direct)
                assert plan.slots <= leaves.bit_length(), (leaves, world)  # floor(log2) + 1


@given(st.integers(1, 8), st.integers(0, 60), st.booleans())
def test_slots_hold_the_sums_of_the_tree(world: int, more: int, direct: bool) -> None:
    """Runs the plans on text: each sum says how it was made."""
    leaves = world + more
    sums: dict[Node, str] = {}
    found = assign(leaves, world)
    for own in found.nodes:
        plan = plan_slots(own, direct=direct)
        slots = [""] * plan.slots
        for leaf in plan.leaves:
            text = str(leaf.leaf)
            slots[leaf.slot] = f"({slots[leaf.slot]}+{text})" if leaf.onto else text
            for to, source in leaf.merges:
                slots[to] = f"({slots[to]}+{slots[source]})"
        sums |= {node: slots[slot] for node, slot in plan.results.items()}
    for node, left, right in additions(leaves, list(sums)):
        sums[node] = f"({sums[left]}+{sums[right]})"
    assert sums[root(leaves)] == written(root(leaves))


def written(node: Node) -> str:
    if node.size == 1:
        return str(node.start)
    left, right = node.children()
    return f"({written(left)}+{written(right)})"
