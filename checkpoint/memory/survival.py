"""What a scheme of redundancy survives, and what it costs: formulas, nothing is run.

*So many nodes lost at once.* A group that bears m losses is lost with m + 1. Of the sets of x lost
nodes those are survived that lose no group, so with c_j the sets of j nodes that a group of size g
bears, their number is the coefficient of z^x in the product over the groups of ``sum_j c_j z^j``,
and the probability is that over C(n, x). For an erasure code c_j = C(g, j) up to j = m. For r
copies in groups of r, as GEMINI places them, c_j = C(r, j) up to j = r - 1: for r <= x < 2r that is
the 1 - (n / r) C(n - r, x - r) / C(n, x) of its Corollary 1 (Wang et al., "GEMINI: Fast Failure
Recovery in Distributed Training with In-Memory Checkpoints", SOSP '23). Where r does not divide n
its last group is a ring, each node's copies on the r - 1 after it: lost are sets with r in a row.

*A span of time.* Nodes fail independently at a rate 1 / MTBF and are replaced, with all redundancy
made anew, after MTTR on average, each at its own pace. Of a group's lost nodes then the next one
fails at rate l_j = (g - j) / MTBF, one comes back at rate u_j = j / MTTR; the mean time until m + 1
are lost is ``sum_(i <= m) sum_(j <= i) (1 / l_j) prod_(j < h <= i) u_h / l_h`` (absorption of a
birth and death process, as for RAID: Patterson et al., 1988). A group is lost within t with
probability 1 - exp(-t / that), where MTTR is much the shorter; so the rates of groups add up.

*Costs.* A node keeps its image and m / k of it as parity, and sends each byte of its image once and
(m - 1) / k of it as others' parity (redset's layout, see `placement`). With r copies it keeps r and
sends r - 1. To give one lost node its image back, k bytes are read for each of it, from the g - 1
nodes left of its group, or one from the r - 1 that have a copy; links count in each direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from planaria.checkpoint.memory.placement import MAX_GROUP, make_groups
from planaria.errors import ConfigError

#: Rings are counted out, so they stay small.
MAX_COPIES = 8


@dataclass(frozen=True)
class Redundancy:
    """A scheme on so many nodes.

    Attributes:
        name: What to call it.
        nodes: Nodes of the job, n.
        losses: Losses that every group bears, wherever they strike.
        patterns: Size of a group -> how many sets of 0, 1, .. of its nodes may be lost.
        groups: Size of a group -> how many there are.
        memory: Bytes kept, for each byte of a node's image; where group sizes differ, at most.
        network: Bytes that a node sends for each byte of its image, each snapshot.
        read: Bytes to read for each byte of a lost node's image.
        sources: From how many nodes, each an equal part.
    """

    name: str
    nodes: int
    losses: int
    patterns: Mapping[int, Sequence[int]]
    groups: Mapping[int, int]
    memory: float
    network: float
    read: float
    sources: int

    def survives(self, lost: int) -> float:
        """The probability that no byte is lost with so many nodes, any of them, at once.

        Raises:
            ConfigError: There are not so many nodes.
        """
        if not 0 <= lost <= self.nodes:
            raise ConfigError(f"{lost} of {self.nodes} nodes cannot be lost")
        if lost <= self.losses:
            return 1.0
        counts = [1]
        for size, count in self.groups.items():
            counts = _times(counts, _power(self.patterns[size], count, lost), lost)
        survived = counts[lost] if lost < len(counts) else 0
        return survived / math.comb(self.nodes, lost)

    def mean_time_to_loss(self, mtbf: float, mttr: float) -> float:
        """Mean time until some group has lost more than it bears, in the unit of the arguments.

        For a ring of copies this counts any losses, not only those in a row: a lower bound.

        Args:
            mtbf: Mean time between failures of one node, > 0.
            mttr: Mean time until a lost node is replaced and all redundancy is there again, > 0.

        Raises:
            ConfigError: A time is out of range.
        """
        if not (0 < mtbf < math.inf and 0 < mttr < math.inf):
            raise ConfigError(f"times to fail and to repair must be > 0, not {mtbf} and {mttr}")
        rate = sum(
            count / _absorption(size, min(self.losses, size - 1), mtbf, mttr)
            for size, count in self.groups.items()
        )
        return 1 / rate

    def loses_within(self, span: float, mtbf: float, mttr: float) -> float:
        """The probability that memory alone is not enough at some time of a span.

        Args:
            span: How long, in the unit of the others.
            mtbf: See `mean_time_to_loss`.
            mttr: See `mean_time_to_loss`.
        """
        return -math.expm1(-span / self.mean_time_to_loss(mtbf, mttr))


def erasure(nodes: int, losses: int, group_size: int = 16) -> Redundancy:
    """Groups with parity, as `placement` forms them.

    Args:
        nodes: Nodes of the job, >= 1.
        losses: Losses that a group bears, m; fewer where there are not so many nodes.
        group_size: Nodes a group, 1 to 255.

    Raises:
        ConfigError: A number is out of range.
    """
    _check(nodes, losses)
    sizes = _sizes(make_groups([""] * nodes, group_size, losses))
    smallest, largest = min(sizes), max(sizes)
    losses = min(losses, smallest - 1)
    k = smallest - losses
    return Redundancy(
        name=f"{largest - losses} + {losses}" if losses else "no parity",
        nodes=nodes,
        losses=losses,
        patterns={g: [math.comb(g, j) for j in range(losses + 1)] for g in sizes},
        groups=sizes,
        memory=1 + losses / k,
        network=1 + (losses - 1) / k if losses else 0.0,
        read=float(largest - losses),
        sources=largest - 1,
    )


def replication(nodes: int, copies: int) -> Redundancy:
    """Copies in groups, as GEMINI places them; the node's own is one of them.

    Args:
        nodes: Nodes of the job, >= 1.
        copies: 1 to 8; no more than there are nodes.

    Raises:
        ConfigError: A number is out of range.
    """
    _check(nodes, copies - 1)
    if copies > MAX_COPIES:
        raise ConfigError(f"at most {MAX_COPIES} copies can be planned with, not {copies}")
    copies = min(copies, nodes)
    last = copies + nodes % copies
    groups = {copies: nodes // copies - 1}
    groups[last] = groups.get(last, 0) + 1
    return Redundancy(
        name=f"{copies} copies",
        nodes=nodes,
        losses=copies - 1,
        patterns={size: _ring(size, copies) for size, count in groups.items() if count},
        groups={size: count for size, count in groups.items() if count},
        memory=float(copies),
        network=float(copies - 1),
        read=1.0,
        sources=copies - 1,
    )


@dataclass(frozen=True)
class Recovery:
    """Seconds until a lost node's image is back; simulated, not measured.

    Attributes:
        scheme: What it is recovered by.
        image_nbytes: Bytes of a node's image.
        link: Bytes a second of each node's link, each way.
        decode: Bytes a second that a node decodes, counted as what it reads.
    """

    scheme: Redundancy
    image_nbytes: float
    link: float
    decode: float = 8e9

    def __post_init__(self) -> None:
        if min(self.image_nbytes, self.link, self.decode) <= 0:
            raise ConfigError("sizes and speeds of a recovery must be > 0")

    @cached_property
    def one_reads(self) -> float:
        """One node in its place reads all that is needed, and decodes it as it comes."""
        return self._seconds(1)

    @cached_property
    def all_read(self) -> float:
        """The rest of the job takes over its ranks, each node an equal part of the image."""
        return self._seconds(max(1, self.scheme.nodes - 1))

    def _seconds(self, readers: int) -> float:
        read = self.scheme.read * self.image_nbytes
        sent = read / max(1, self.scheme.sources) / self.link
        decoded = read / readers / self.decode if self.scheme.read > 1 else 0.0
        return max(sent, read / readers / self.link, decoded)


def domains_survived(failure_domains: Sequence[str], group_size: int, losses: int) -> int:
    """How many whole failure domains may be lost at once, whichever they are.

    Args:
        failure_domains: The domain of each node; "" is one of its own.
        group_size: Nodes a group.
        losses: Losses that a group bears.
    """
    survived = len(set(failure_domains) - {""}) + failure_domains.count("")
    for group in make_groups(failure_domains, group_size, losses):
        names = [failure_domains[node] or f"node {node}" for node in group]
        shares = sorted((names.count(name) for name in set(names)), reverse=True)
        left, whole = min(losses, len(group) - 1), 0
        for share in shares:
            if share > left:
                break
            left, whole = left - share, whole + 1
        else:
            continue  # all of them: the group is never lost
        survived = min(survived, whole)
    return survived


def _check(nodes: int, losses: int) -> None:
    if nodes < 1 or losses < 0:
        raise ConfigError(f"a plan needs at least one node and one copy, not {nodes}, {losses + 1}")
    if losses >= MAX_GROUP:
        raise ConfigError(f"groups bear fewer than {MAX_GROUP} losses, not {losses}")


def _sizes(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for group in groups:
        sizes[len(group)] = sizes.get(len(group), 0) + 1
    return sizes


def _ring(size: int, copies: int) -> list[int]:
    """How many sets of j nodes of a ring have fewer than `copies` in a row, for j = 0, 1, .."""
    counts = [0] * (size + 1)
    for lost in product((False, True), repeat=size):
        twice = lost + lost
        if not any(all(twice[i : i + copies]) for i in range(size)):
            counts[sum(lost)] += 1
    return counts


def _absorption(size: int, losses: int, mtbf: float, mttr: float) -> float:
    """Mean time until losses + 1 of a group's nodes are lost at once, all being there at first."""
    total = 0.0
    step = 0.0  # mean time from i lost nodes to i + 1 for the first time
    for i in range(losses + 1):
        fails = (size - i) / mtbf
        step = 1 / fails + (i / mttr) / fails * step
        total += step
    return total


def _times(a: Sequence[int], b: Sequence[int], degree: int) -> list[int]:
    """The product of two polynomials, up to a degree."""
    result = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j in range(min(len(b), len(result) - i)):
            result[i + j] += x * b[j]
    return result


def _power(a: Sequence[int], exponent: int, degree: int) -> list[int]:
    result, base = [1], list(a)
    while exponent:
        if exponent & 1:
            result = _times(result, base, degree)
        base = _times(base, base, degree)
        exponent >>= 1
    return result
