"""Where everything lies: groups of nodes, and which node of a group holds which part of a stripe.

Groups are formed over failure domains (racks, say), so that the nodes of a group share as few of
them as possible. In a group of g nodes that survives m losses there are g stripes of g parts, one
part a node. The parity nodes of stripe s are s, s + 1, .., s + m - 1 (mod g); the others hold data.
Every node so holds parity in m stripes and data in k = g - m: its image is cut into k chunks, one
for each of these, in ascending order. All chunks of a group have one length, the least that is
enough for its longest image; what lies beyond the end of an image counts as zeros and is stored
nowhere. Parity is m / k of the image (redset's Reed-Solomon scheme; REFT, arXiv 2310.12670, for
m = 1).

Everything here is arithmetic: no node, no socket, no memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from planaria.errors import ConfigError

#: Chunks are whole pages.
PAGE = 4096
#: Parts of a stripe, at most: what the erasure code can tell apart.
MAX_GROUP = 255


def make_groups(failure_domains: Sequence[str], group_size: int, losses: int) -> list[list[int]]:
    """Forms groups of nodes that are to back each other up.

    Sizes differ by one at most. No group has more than ``group_size`` nodes, unless it could not
    bear the losses otherwise (5 nodes in groups of 4 that survive 2 are one group of 5). Of a
    domain with c nodes each group gets c / groups of them, rounded up at most, which is the least
    there can be. Where all domains are the same, or all differ, groups are neighbours in the list.

    Args:
        failure_domains: The domain of each node; "" is one of its own.
        group_size: Nodes a group.
        losses: Losses that a group should survive.

    Returns:
        Indices of the nodes of each group, ascending. Takes time in proportion to n log n.

    Raises:
        ConfigError: The group size is out of range.
    """
    n = len(failure_domains)
    if not 1 <= group_size <= MAX_GROUP or losses < 0:
        raise ConfigError(
            f"groups have 1 to {MAX_GROUP} nodes and survive 0 or more losses, "
            f"not {group_size} and {losses}"
        )
    if n == 0:
        return []
    count = max(1, min(-(-n // group_size), n // (losses + 1)))
    if -(-n // count) > MAX_GROUP:
        raise ConfigError(f"{n} nodes do not fit into groups of {MAX_GROUP} that survive {losses}")
    by_domain: defaultdict[str, list[int]] = defaultdict(list)
    for node, domain in enumerate(failure_domains):
        by_domain[domain].append(node)
    alone = len(by_domain.pop("", ()))
    if len(by_domain) <= 1 - bool(alone) or all(len(nodes) == 1 for nodes in by_domain.values()):
        cuts = [n * i // count for i in range(count + 1)]
        return [list(range(cuts[i], cuts[i + 1])) for i in range(count)]
    order = [node for domain in sorted(by_domain) for node in by_domain[domain]]
    order += [node for node, domain in enumerate(failure_domains) if not domain]
    return [sorted(order[i::count]) for i in range(count)]


class Part(NamedTuple):
    """Some bytes of a node's image, as bytes of a chunk.

    Attributes:
        stripe: The stripe of the chunk.
        start: First byte in the chunk.
        nbytes: How many, >= 1.
    """

    stripe: int
    start: int
    nbytes: int


class Stripes:
    """The stripes of one group; nodes are numbered 0 .. nodes - 1.

    Attributes:
        nodes: Nodes of the group, which are also the stripes and the parts of a stripe.
        m: Parity parts of a stripe.
        k: Data parts of a stripe.
        lengths: Bytes of each node's image.
        chunk_nbytes: Bytes of every part, a multiple of 4096; 0 if all images are empty.
    """

    def __init__(self, nodes: int, losses: int, lengths: Sequence[int]) -> None:
        """Lays out the stripes.

        Args:
            nodes: Nodes of the group, 1 to 255.
            losses: Losses that it survives, less than `nodes`; 0 for no parity.
            lengths: Bytes of each node's image.

        Raises:
            ConfigError: The numbers do not fit together.
        """
        if not (1 <= nodes <= MAX_GROUP and 0 <= losses < nodes):
            raise ConfigError(
                f"a group has 1 to {MAX_GROUP} nodes and survives fewer losses than it has nodes; "
                f"not {nodes} and {losses}"
            )
        if len(lengths) != nodes or min(lengths) < 0:
            raise ConfigError(f"{nodes} nodes need {nodes} lengths >= 0, not {list(lengths)}")
        self.nodes, self.m, self.k = nodes, losses, nodes - losses
        self.lengths = tuple(lengths)
        self.chunk_nbytes = -(-max(lengths) // (self.k * PAGE)) * PAGE

    def parity_nodes(self, stripe: int) -> list[int]:
        """The nodes that hold parts k, k + 1, .. of a stripe; the first one computes them."""
        return [(stripe + i) % self.nodes for i in range(self.m)]

    def data_nodes(self, stripe: int) -> list[int]:
        """The nodes that hold parts 0 .. k - 1 of a stripe, ascending."""
        return [node for node in range(self.nodes) if not self._is_parity(node, stripe)]

    def part_nodes(self, stripe: int) -> list[int]:
        """The node of each part of a stripe, in the order that the erasure code counts them."""
        return self.data_nodes(stripe) + self.parity_nodes(stripe)

    def parity_stripes(self, node: int) -> list[int]:
        """The stripes in which a node holds parity: as part k in the first, k + 1 in the second."""
        return [(node - i) % self.nodes for i in range(self.m)]

    def data_stripes(self, node: int) -> list[int]:
        """The stripes in which a node holds data, ascending: one for each chunk of its image."""
        return [s for s in range(self.nodes) if not self._is_parity(node, s)]

    def data_offset(self, node: int, stripe: int) -> int:
        """Where a node's chunk in a stripe begins in its image; it may reach beyond that one's end.

        Raises:
            ConfigError: The node holds parity in that stripe.
        """
        if self._is_parity(node, stripe):
            raise ConfigError(f"node {node} holds parity, not data, in stripe {stripe}")
        before = sum(s < stripe for s in self.parity_stripes(node))
        return (stripe - before) * self.chunk_nbytes

    def data_nbytes(self, node: int, stripe: int) -> int:
        """Bytes of a node's chunk in a stripe that lie within its image; zeros follow.

        Raises:
            ConfigError: The node holds parity in that stripe.
        """
        left = self.lengths[node] - self.data_offset(node, stripe)
        return max(0, min(left, self.chunk_nbytes))

    def locate(self, node: int, offset: int, nbytes: int) -> list[Part]:
        """The parts of chunks that some bytes of a node's image lie in, in order.

        Raises:
            ConfigError: They are not all within the image.
        """
        if not 0 <= offset <= offset + nbytes <= self.lengths[node]:
            raise ConfigError(
                f"{nbytes} bytes from {offset} are not within {self.lengths[node]} of node {node}"
            )
        parts = []
        stripes = self.data_stripes(node)
        while nbytes:
            chunk, start = divmod(offset, self.chunk_nbytes)
            length = min(nbytes, self.chunk_nbytes - start)
            parts.append(Part(stripes[chunk], start, length))
            offset, nbytes = offset + length, nbytes - length
        return parts

    def _is_parity(self, node: int, stripe: int) -> bool:
        return (node - stripe) % self.nodes < self.m
