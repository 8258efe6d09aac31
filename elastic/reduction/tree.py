"""The fixed tree of a sum: which partial sums are added to which, whoever holds them.

The leaves of a step are numbered 0 to n-1. A node is a run of leaves, [start, stop), and its
children are its halves, so the tree is a function of n and of nothing else: 2, 4 or 8 ranks that
have like numbers of leaves have one node each. Floating-point
addition is not associative: as long as every rank adds along this tree, it does not matter which
rank added what.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from planaria.errors import ConfigError


class Node(NamedTuple):
    """A node of the tree: the leaves from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self.stop - self.start

    def children(self) -> "tuple[Node, Node]":
        """The two nodes that are added to make this one, left one first.

        They are halves, the left one larger by a leaf where it cannot be even.

        Raises:
            ConfigError: This node is a leaf.
        """
        if self.size < 2:
            raise ConfigError(f"leaf {self.start} of a reduction tree has no children")
        middle = self.start + (self.size + 1) // 2
        return Node(self.start, middle), Node(middle, self.stop)

    def within(self, other: "Node") -> bool:
        """Whether all leaves of this node are leaves of the other."""
        return other.start <= self.start and self.stop <= other.stop


def root(leaves: int) -> Node:
    """The node of all leaves.

    Raises:
        ConfigError: There are none.
    """
    if leaves < 1:
        raise ConfigError(f"a reduction needs at least one leaf, not {leaves}")
    return Node(0, leaves)


def complete_nodes(leaves: int, held: Collection[int]) -> list[Node]:
    """The largest nodes of which every leaf is held, from left to right.

    Args:
        leaves: Number of leaves of the tree.
        held: The leaves that somebody holds.
    """
    wanted = set(held)
    found: list[Node] = []

    def visit(node: Node) -> int:
        """Returns how many leaves are held; a node is complete where all of them are."""
        if node.size == 1:
            count = int(node.start in wanted)
        else:
            mark = len(found)
            count = sum(visit(child) for child in node.children())
            if count == node.size:
                del found[mark:]
        if count == node.size:
            found.append(node)
        return count

    visit(root(leaves))
    return found


def cover(leaves: int, nodes: Collection[Node]) -> None:
    """Checks that some nodes are nodes of the tree and hold each leaf exactly once.

    Raises:
        ConfigError: They do not; it names the first node or leaf that is wrong.
    """
    left = set(nodes)

    def visit(node: Node) -> None:
        if node in left:
            left.remove(node)
        elif node.size == 1:
            raise ConfigError(f"no rank holds leaf {node.start} of the reduction's {leaves}")
        else:
            for child in node.children():
                visit(child)

    visit(root(leaves))
    if left or len(nodes) != len(set(nodes)):
        raise ConfigError(
            f"nodes {sorted(left)} are held twice, or are none of a tree of {leaves} leaves"
        )


class Add(NamedTuple):
    """One addition: `left` + `right`, which together are `node`."""

    node: Node
    left: Node
    right: Node


def additions(leaves: int, nodes: Collection[Node]) -> Iterator[Add]:
    """The additions that make the root out of nodes that cover the tree, in an order that works.

    Few results are open at a time: a node is used as soon as its sibling is there.
    """
    there = set(nodes)

    def visit(node: Node) -> Iterator[Add]:
        if node not in there:
            left, right = node.children()
            yield from visit(left)
            yield from visit(right)
            yield Add(node, left, right)

    return visit(root(leaves))
