"""The tree over ranks that are threads: the same bits for all worlds; what is wrong is noticed."""

from collections.abc import Callable

import pytest
import torch
from local_ranks import Hub, LocalTransport, on_threads

from planaria.core.deadline import Deadline
from planaria.elastic.reduction import ordered
from planaria.elastic.reduction.assignment import Assignment, assign, contiguous
from planaria.elastic.reduction.exchange import Exchange, even_bounds
from planaria.elastic.reduction.messages import HEAD_BYTES, deliver
from planaria.elastic.reduction.tree import Node, additions, root
from planaria.errors import CollectiveError, ConfigError

NUMEL = 37
Split = Callable[[int, int], Assignment]


def leaf_values(leaves: int) -> list[torch.Tensor]:
    """One tensor a leaf, of magnitudes that make every order of adding give other bits."""
    generator = torch.Generator().manual_seed(leaves)
    scale = 10.0 ** torch.randint(-4, 5, (leaves, 1), generator=generator)
    return list((torch.randn(leaves, NUMEL, generator=generator) * scale).unbind())


def local_sums(assignment: Assignment, rank: int) -> dict[Node, torch.Tensor]:
    values = leaf_values(assignment.leaves)

    def value(node: Node) -> torch.Tensor:
        if node.size == 1:
            return values[node.start]
        left, right = node.children()
        return value(left) + value(right)

    return {node: value(node).clone() for node in assignment.nodes[rank]}


def reduced(assignment: Assignment, bounds: list[int] | None = None) -> list[torch.Tensor]:
    """What each rank has in the end, by scatter and gather."""
    cuts = bounds or even_bounds(NUMEL, assignment.world_size)

    def body(transport: LocalTransport) -> torch.Tensor:
        exchange = Exchange(assignment, transport)
        sums = local_sums(assignment, transport.rank)
        before = {node: tensor.clone() for node, tensor in sums.items()}
        out = torch.full((NUMEL,), torch.nan)
        for bucket in range(2):  # buffers are used again
            last = exchange.start(bucket, sums, cuts, out, whole=True)(Deadline(60))
            if last is not None:
                last(Deadline(60))
        assert all(torch.equal(before[node], tensor) for node, tensor in sums.items())
        return out

    return on_threads(assignment.world_size, body)


def expected(leaves: int) -> torch.Tensor:
    return local_sums(Assignment(leaves, ((root(leaves),),)), 0)[root(leaves)]


def differing(split: Split = assign, leaves: range = range(1, 25)) -> list[tuple[int, int]]:
    """The (leaves, world size) whose result is not the one rank's, bit for bit."""
    return [
        (count, world)
        for count in leaves
        for world in range(1, min(count, 8) + 1)
        if any(
            not torch.equal(out.view(torch.int32), expected(count).view(torch.int32))
            for out in reduced(split(count, world))
        )
    ]


def test_all_worlds_give_the_same_bits() -> None:
    assert not differing()


def test_any_assignment_gives_the_same_bits() -> None:
    def scrambled(leaves: int, world: int) -> Assignment:
        found = assign(leaves, world)
        return Assignment(leaves, found.nodes[::-1])

    assert not differing(contiguous, range(5, 14))
    assert not differing(scrambled, range(5, 14))


def test_parts_may_be_uneven_and_empty() -> None:
    for out in reduced(assign(7, 3), [0, 0, 30, NUMEL]):
        assert torch.equal(out, expected(7))


def test_volume_is_what_the_assignment_says() -> None:
    for leaves, world in ((8, 4), (8, 3), (24, 5), (24, 7)):
        assignment = assign(leaves, world)
        hub = Hub(world)
        numel = world * 10
        for rank in range(world):
            exchange = Exchange(assignment, LocalTransport(hub, rank))
            sums = {node: torch.zeros(numel) for node in assignment.nodes[rank]}
            exchange.scatter(0, sums, even_bounds(numel, world))
        assert sum(hub.sent.values()) == pytest.approx(assignment.sent * numel)


def test_another_tree_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the additions between ranks pair other nodes."""

    def reordered(self: Exchange, there: dict[Node, torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(torch.stack([there[n] for n in sorted(there, reverse=True)]).sum(0))

    monkeypatch.setattr(Exchange, "_combine", reordered)
    assert differing(leaves=range(5, 9))


def test_an_order_by_rank_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: each rank adds what others sent to its own sum."""

    def own_first(self: Exchange, there: dict[Node, torch.Tensor], out: torch.Tensor) -> None:
        nodes = sorted(there, key=lambda node: node not in self._own)
        out.copy_(torch.stack([there[node] for node in nodes]).sum(0))

    monkeypatch.setattr(Exchange, "_combine", own_first)
    assert differing(leaves=range(5, 9))


def test_sums_by_rank_are_noticed() -> None:
    """Sabotage: each rank adds up its leaves from left to right, as plain accumulation does."""

    def plain(leaves: int, world: int) -> bytes:
        values, found = leaf_values(leaves), assign(leaves, world)
        parts = [torch.stack([values[i] for i in found.leaves_of(r)]) for r in range(world)]
        total = torch.zeros(NUMEL)
        for part in parts:
            own = torch.zeros(NUMEL)
            for value in part:
                own += value
            total += own
        return total.numpy().tobytes()

    assert len({plain(12, world) for world in range(1, 8)}) > 1


def test_who_sends_nothing_is_missed() -> None:
    def body(transport: LocalTransport) -> str:
        if transport.rank == 1:
            return ""
        assignment = assign(4, 2)
        exchange = Exchange(assignment, transport)
        sums = local_sums(assignment, 0)
        with pytest.raises(CollectiveError) as caught:
            exchange.scatter(0, sums, even_bounds(NUMEL, 2))(Deadline(0.05), torch.empty(18))
        return str(caught.value)

    assert "nothing from rank 1" in on_threads(2, body)[0]


def test_an_assignment_for_other_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="for 3 ranks on a transport of 2"):
        Exchange(assign(4, 3), LocalTransport(Hub(2), 0))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_norms_and_means_do_not_depend_on_the_ranks(world: int) -> None:
    blocks = [v * 3 for v in leaf_values(11)]
    owners = [(7 * i + 3) % world for i in range(len(blocks))]

    def body(transport: LocalTransport) -> float:
        mine = [
            ordered.squared_norm(b)
            for b, owner in zip(blocks, owners, strict=True)
            if owner == transport.rank
        ]
        return ordered.global_norm(transport, mine, owners, Deadline(60))

    alone = ordered.ordered_sum(map(ordered.squared_norm, blocks)) ** 0.5
    assert on_threads(world, body) == [alone] * world
    assert alone == pytest.approx(float(torch.cat(blocks).norm()))


def test_the_norm_of_a_block_does_not_depend_on_where_it_lies() -> None:
    values = torch.randn(70_001)
    room = torch.empty(values.numel() + 20)
    norms = set()
    for offset in range(17):
        block = room[offset : offset + values.numel()]
        block.copy_(values)
        norms.add(ordered.squared_norm(block))
    assert len(norms) == 1


def test_weighted_means() -> None:
    assert ordered.weighted_mean([1, 3], [2.0, 6.0]) == 5.0
    assert ordered.weighted_mean([0, 0], [2.0, 6.0]) == 0.0
    assert ordered.clip_coefficient(4.0, 1.0) == pytest.approx(0.25)
    assert ordered.clip_coefficient(0.5, 1.0) == 1.0


def test_additions_need_every_leaf() -> None:
    with pytest.raises(ConfigError, match="no children"):
        list(additions(3, [Node(0, 2)]))


def test_messages_of_any_length_arrive() -> None:
    """Also those that just fill the head, or are one byte longer, and where only some have more."""
    lengths = [0, 1, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1, 3 * HEAD_BYTES]

    def talk(transport: LocalTransport) -> list[dict[int, bytes]]:
        me, said = transport.rank, []
        for tag, length in enumerate(lengths):
            out = {p: bytes([me, p]) * (length // 2) + b"!" * (length % 2) for p in range(3)}
            if me == 2:
                out = {0: b"short"}
            said.append(deliver(transport, out, Deadline(20), tag=10 + 2 * tag))
        return said

    found = on_threads(3, talk)
    for at, length in enumerate(lengths):
        message = bytes([0, 1]) * (length // 2) + b"!" * (length % 2)
        assert found[1][at].get(0, b"") == message
        assert found[0][at][2] == b"short"
        assert 2 not in found[1][at], "it said nothing"
