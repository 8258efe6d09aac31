"""How a committed step reaches the model: over blocks (ZeRO), or by the user's own optimizer.

Both apply a step without asking another rank, so a rank that has heard late that the step was
committed catches up alone; what is then missing is spread.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import Block, cut, shapes_of
from planaria.elastic.partition.holders import Placement, fills, place, replace
from planaria.elastic.partition.moves import Move, TransferPlan
from planaria.elastic.partition.optimizer import UPDATE, ShardedOptimizer
from planaria.elastic.partition.owners import Partition, spread
from planaria.elastic.partition.refresh import Refresh
from planaria.elastic.partition.transfer import Transfer, transfer
from planaria.elastic.reduction.buckets import Segment
from planaria.elastic.reduction.ordered import squared_norm
from planaria.elastic.reduction.reducer import Reduced
from planaria.elastic.reduction.transport import Transport

if TYPE_CHECKING:
    import torch

Gradient = Mapping[Segment, "torch.Tensor"]
#: What a rank says that it has: names of members to blocks, as indices.
Claims = Mapping[int, Collection[int]]
Meanwhile = Callable[[Collection[int]], object]


class Updater(Protocol):
    """What applies steps.

    Attributes:
        whole: Whether it needs the whole gradient on every rank.
        carried: Whether a rank that joins needs the optimizer's state with the model, at once.
        nodes: Labels of ranks' nodes: copies of a block go to different ones where they can.
    """

    whole: bool
    carried: bool
    nodes: Mapping[int, str]

    @property
    def placement(self) -> Placement:
        """Who computes the norm of which block; with an optimizer over blocks, who holds it."""
        ...

    @property
    def held(self) -> list[int]:
        """The blocks whose state is here, as indices."""
        ...

    @property
    def spread_bytes(self) -> int:
        """Bytes that :meth:`spread` brings here."""
        ...

    @property
    def ready(self) -> bool:
        """Whether those that hold nothing yet have been sent all that they are to hold."""
        ...

    def segments(self) -> list[Segment]:
        """The blocks as a `GradientReducer` wants them; ranks are places among all."""
        ...

    def squared_norms(self, gradient: Gradient) -> list[float]:
        """Of the own blocks, in block order."""
        ...

    def apply(self, gradient: Gradient, touched: Collection[str], factor: float) -> None:
        """Applies a gradient, multiplied with a factor, to all that is here."""
        ...

    def spread(self, deadline: Deadline) -> None:
        """Brings what was updated to all ranks."""
        ...

    def arrange(
        self,
        ranks: Sequence[int],
        spare: Collection[int],
        owned: Claims,
        held: Claims,
        stale: Collection[int],
        transport: Transport,
        deadline: Deadline,
        meanwhile: Meanwhile,
    ) -> list[Block]:
        """Goes on with other ranks: blocks get owners and shadows, and are sent to them.

        Args:
            ranks: All ranks, by names that they keep; in the transport's order.
            spare: Those that hold nothing.
            owned: The blocks that ranks say are theirs.
            held: The blocks that ranks have the state of.
            stale: Ranks whose parameters lack what was committed last; they get them.
            transport: The ranks.
            deadline: Until when all must be there.
            meanwhile: Called once it is certain who is to hold what, while it is sent; with the
                blocks that are here already and stay as they are.

        Returns:
            The blocks that nobody holds any more; if there are any, nothing was changed.
        """
        ...

    def send_ahead(self, deadline: Deadline, budget: float | None) -> None:
        """Starts to send those that hold nothing yet their share; all ranks call it, before a step.

        Args:
            deadline: Until when all must have said what they send.
            budget: Bytes that this rank's links carry in a step; None where that is not known.

        Raises:
            CollectiveError: A rank is gone.
            DeadlineError: A rank said nothing in time.
        """
        ...

    def take_ahead(self, deadline: Deadline) -> None:
        """Has here what was sent ahead in this step; blocks may be updated only then.

        Raises:
            CollectiveError: A rank is gone.
            DeadlineError: It was not here in time.
        """
        ...

    def promote(self) -> None:
        """Those that were sent their share hold it from now on, once they are `ready`."""
        ...

    def sole_bytes(self, going: Collection[int], heirs: Sequence[int]) -> int:
        """Bytes that the busiest rank would move in :meth:`hand_over`, as far as it is known here.

        Args:
            going: Ranks that are about to go.
            heirs: Ranks that can be given blocks.
        """
        ...

    def hand_over(self, going: Collection[int], heirs: Sequence[int], deadline: Deadline) -> None:
        """Sends the blocks that only ranks hold that are about to go to others; all ranks call it.

        Args:
            going: Ranks that are about to go.
            heirs: Ranks that can be given blocks.
            deadline: Until when all must be there.

        Raises:
            CollectiveError: A rank is gone.
            DeadlineError: It was not done in time.
        """
        ...


class BlockUpdater:
    """Updates blocks where they are held, and spreads them.

    Args:
        parameters: Name -> parameter.
        optimizer: The user's optimizer: its kind, its groups, its options.
        redundancy: Shadows of a block.
        whole: Whether all ranks get the whole gradient all the same (ZeRO-1).
        uncut: Parameters that are not cut into blocks.
    """

    carried = False

    def __init__(
        self,
        parameters: "Mapping[str, torch.Tensor]",
        optimizer: "torch.optim.Optimizer",
        redundancy: int,
        *,
        whole: bool = False,
        uncut: Collection[str] = (),
    ) -> None:
        self.whole, self.nodes = whole, {}
        self._parameters, self._source, self._redundancy = parameters, optimizer, redundancy
        self.blocks = cut(shapes_of(parameters), whole=uncut)
        self._model_bytes = [
            block.box.volume * parameters[block.name].element_size() for block in self.blocks
        ]
        self._optimizer: ShardedOptimizer | None = None
        # What is to be once those that hold nothing have been sent their share.
        self._later: Placement | None = None
        self._ahead: Transfer | None = None

    @property
    def sharded(self) -> ShardedOptimizer:
        """The optimizer over blocks."""
        assert self._optimizer is not None, "start() comes first"
        return self._optimizer

    @property
    def placement(self) -> Placement:
        """See `Updater.placement`."""
        return self.sharded.placement

    @property
    def held(self) -> list[int]:
        """See `Updater.held`."""
        return [] if self._optimizer is None else self._optimizer.held

    @property
    def spread_bytes(self) -> int:
        """See `Updater.spread_bytes`."""
        others = set(range(len(self.blocks))) - set(self.sharded.owned)
        return sum(self._model_bytes[i] for i in others)

    def state_bytes(self, index: int) -> int:
        """Bytes of a block's state that is here."""
        state = self.sharded.export(index).values()
        return sum(v.numel() * v.element_size() for v in state if hasattr(v, "element_size"))

    def start(self, ranks: Sequence[int], transport: Transport) -> None:
        """Begins a run: every rank has the same model, and takes its blocks from it."""
        placement = place(self.blocks, ranks, self._redundancy, self.nodes)
        self._later = self._ahead = None
        self._optimizer = ShardedOptimizer(self._parameters, self._source, placement, transport)

    @property
    def ready(self) -> bool:
        """See `Updater.ready`."""
        return self._ahead is not None and self._ahead.done

    def segments(self) -> list[Segment]:
        """See `Updater.segments`: who is to hold a block is a shadow of it already."""
        now, later = self.placement, self._later
        if later is not None:
            both = (
                {*now.shadows[i], *later.holders(i)} - {now.partition.owners[i]}
                for i in range(len(self.blocks))
            )
            now = Placement(now.partition, tuple(tuple(sorted(ranks)) for ranks in both))
        return now.segments()

    def squared_norms(self, gradient: Gradient) -> list[float]:
        """See `Updater.squared_norms`."""
        return self.sharded.squared_norms(gradient)

    def apply(self, gradient: Gradient, touched: Collection[str], factor: float) -> None:
        """See `Updater.apply`."""
        self.sharded.apply(gradient, touched, factor)

    def spread(self, deadline: Deadline) -> None:
        """See `Updater.spread`."""
        self.sharded.spread(deadline)

    def arrange(
        self,
        ranks: Sequence[int],
        spare: Collection[int],
        owned: Claims,
        held: Claims,
        stale: Collection[int],
        transport: Transport,
        deadline: Deadline,
        meanwhile: Meanwhile,
    ) -> list[Block]:
        """See `Updater.arrange`."""
        self._later = self._ahead = None
        if not set(ranks) - set(spare):
            return list(self.blocks)  # all that held any are gone
        placement = self._replace(ranks, owned, held, spare)
        plan = fills(placement, held)
        if plan.recovered:
            return [block for _, block, _ in plan.recovered]
        if self._optimizer is None:
            self._optimizer = ShardedOptimizer(
                self._parameters, self._source, placement, transport, hold=False
            )
        soon = placement.held()
        refresh = Refresh(
            self.blocks, self._parameters, self._optimizer, ranks, held, soon, stale, transport
        )
        way = Transfer(plan.moves, ranks, self._optimizer, transport)
        if plan.moves:
            way.start(deadline)
        refresh.start()
        self._optimizer.adopt(placement, transport)
        if spare:
            self._plan_ahead(ranks, held)
        me = ranks[transport.rank]
        coming = {move.index for move in plan.moves if move.target == me}
        meanwhile(set(self.held) - coming)
        way.take(deadline)
        refresh.take(deadline)
        return []

    def _replace(
        self, ranks: Sequence[int], owned: Claims, held: Claims, spare: Collection[int] = ()
    ) -> Placement:
        return replace(
            self.blocks, ranks, self._redundancy, owned, held, spare=spare, nodes=self.nodes
        )

    def _plan_ahead(self, ranks: Sequence[int], held: Claims) -> None:
        """Plans what those that hold nothing are sent while they look on."""
        placement = self.placement
        now = placement.held()
        held = {rank: {*held.get(rank, ()), *now[rank]} for rank in ranks}
        self._later = later = self._replace(ranks, placement.partition.owned(), held)
        # All else is let go of.
        then = later.held()
        kept = {rank: held[rank] & {*now[rank], *then[rank]} for rank in ranks}
        plan = fills(later, kept)
        self._ahead = Transfer(plan.moves, ranks, self.sharded, self.sharded.transport)

    def send_ahead(self, deadline: Deadline, budget: float | None) -> None:
        """See `Updater.send_ahead`."""
        assert self._ahead is not None, "there is nobody to send anything"
        self._ahead.start(deadline, budget)

    def take_ahead(self, deadline: Deadline) -> None:
        """See `Updater.take_ahead`."""
        if self._ahead is not None:
            self._ahead.take(deadline)

    def promote(self) -> None:
        """See `Updater.promote`."""
        assert self._later is not None
        assert self.ready, "not all have what they are to hold"
        self.sharded.adopt(self._later, self.sharded.transport)
        self._later = self._ahead = None

    def sole_bytes(self, going: Collection[int], heirs: Sequence[int]) -> int:
        """See `Updater.sole_bytes`."""
        moves = self._inheritance(going, heirs).moves
        loads: dict[int, int] = {}
        for move in moves:
            for rank in (move.source, move.target):
                loads[rank] = loads.get(rank, 0) + move.block.nbytes
        # Slots are as large for one block as for another.
        ratios = [self.state_bytes(i) / max(1, self.blocks[i].nbytes) for i in self.held]
        return int(max(loads.values(), default=0) * max(ratios, default=0.0))

    def hand_over(self, going: Collection[int], heirs: Sequence[int], deadline: Deadline) -> None:
        """See `Updater.hand_over`."""
        plan, sharded = self._inheritance(going, heirs), self.sharded
        transfer(plan.moves, self.placement.partition.ranks, sharded, sharded.transport, deadline)

    def _inheritance(self, going: Collection[int], heirs: Sequence[int]) -> TransferPlan:
        placement, partition = self.placement, self.placement.partition
        ranks, going = partition.ranks, set(going)
        alone = [i for i in range(len(self.blocks)) if going.issuperset(placement.holders(i))]
        if not alone or not heirs:
            return TransferPlan((), ())
        spare = set(ranks) - set(heirs)
        after = self._replace(ranks, partition.owned(), placement.held(), spare)
        moves = [Move(i, self.blocks[i], partition.owners[i], after.partition.owners[i])
                 for i in alone]  # fmt: skip
        return TransferPlan(tuple(moves), ())

    def drop(self) -> None:
        """Lets go of blocks that this rank need not hold, once all ranks have theirs."""
        sharded = self.sharded
        me = sharded.placement.partition.ranks[sharded.transport.rank]
        sharded.drop(() if self._later is None else self._later.of(me))


class ReplicaUpdater:
    """Every rank steps the user's own optimizer over the whole gradient.

    Args:
        parameters: Name -> parameter.
        optimizer: The optimizer.
    """

    whole = carried = True

    def __init__(
        self, parameters: "Mapping[str, torch.Tensor]", optimizer: "torch.optim.Optimizer"
    ) -> None:
        self._parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self._source = optimizer
        self.blocks = cut(shapes_of(parameters))
        self._placement: Placement | None = None
        self.nodes = {}

    @property
    def placement(self) -> Placement:
        """See `Updater.placement`."""
        assert self._placement is not None, "start() comes first"
        return self._placement

    @property
    def held(self) -> list[int]:
        """See `Updater.held`: everything, everywhere."""
        return []

    @property
    def ready(self) -> bool:
        """See `Updater.ready`: who joins is sent everything at once."""
        return True

    def segments(self) -> list[Segment]:
        """See `Updater.segments`."""
        return self.placement.segments()

    def send_ahead(self, deadline: Deadline, budget: float | None) -> None:
        """See `Updater.send_ahead`: there is nothing to send."""

    def take_ahead(self, deadline: Deadline) -> None:
        """See `Updater.take_ahead`."""

    def promote(self) -> None:
        """See `Updater.promote`."""

    def start(self, ranks: Sequence[int], transport: Transport) -> None:
        """Begins a run: every rank has the same model and the same optimizer."""
        self._placement = Placement.plain(spread(self.blocks, ranks))
        self._rank = transport.rank

    def squared_norms(self, gradient: Gradient) -> list[float]:
        """See `Updater.squared_norms`."""
        index = {(s.name, s.start): value for s, value in gradient.items()}
        partition = self.placement.partition
        own = [self.blocks[i] for i in partition.of(partition.ranks[self._rank])]
        return [squared_norm(index[block.name, block.start]) for block in own]

    def apply(self, gradient: Gradient, touched: Collection[str], factor: float) -> None:
        """See `Updater.apply`."""
        points.point(UPDATE)
        if factor != 1.0:
            for value in gradient.values():
                value.mul_(factor)
        Reduced(dict(gradient), 1.0, [], [], set(touched)).assign(self._parameters)
        self._source.step()

    def spread(self, deadline: Deadline) -> None:
        """See `Updater.spread`: every rank has updated all of it."""

    def arrange(
        self,
        ranks: Sequence[int],
        spare: Collection[int],
        owned: Claims,
        held: Claims,
        stale: Collection[int],
        transport: Transport,
        deadline: Deadline,
        meanwhile: Meanwhile,
    ) -> list[Block]:
        """See `Updater.arrange`: there is nothing to send."""
        busy = [rank for rank in ranks if rank not in spare]
        if not busy:
            return list(self.blocks)  # nobody is left that has the run's state
        self.start(busy, transport)
        owners = self.placement.partition.owners
        partition = Partition(tuple(self.blocks), tuple(sorted(ranks)), owners)
        self._placement = Placement.plain(partition)
        meanwhile(())
        return []

    @property
    def spread_bytes(self) -> int:
        """See `Updater.spread_bytes`."""
        return 0

    def sole_bytes(self, going: Collection[int], heirs: Sequence[int]) -> int:
        """See `Updater.sole_bytes`: every rank has all of it."""
        return 0

    def hand_over(self, going: Collection[int], heirs: Sequence[int], deadline: Deadline) -> None:
        """See `Updater.hand_over`: there is nothing to send."""

    def drop(self) -> None:
        """Does nothing."""
