"""The gradient of a step, the same bits for any number of ranks.

::

    reducer = GradientReducer(dict(model.named_parameters()), 8, assign(8, world), transport)
    reducer.begin(Deadline(60))
    for index in reducer.order:                      # the micro-batches of this rank
        with reducer.micro_batch(index):
            loss(model, index).backward()            # once; the gradients are taken out of .grad
    reduced = reducer.finish()                       # the mean over all micro-batches of all ranks
    reduced.assign(parameters)                       # into .grad
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from planaria.core.deadline import Deadline
from planaria.elastic.reduction import buckets as layout
from planaria.elastic.reduction.accumulate import BucketSums
from planaria.elastic.reduction.assignment import Assignment
from planaria.elastic.reduction.exchange import Exchange
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.ordered import ordered_sum, share, weighted_mean
from planaria.elastic.reduction.partial import LeafPlan, plan_slots
from planaria.elastic.reduction.staged import mark, settle
from planaria.elastic.reduction.transport import Complete, Transport, Wait
from planaria.elastic.reduction.tree import Node
from planaria.elastic.reduction.worker import ReductionThread
from planaria.errors import ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

Consistency = Literal["bitwise", "fast"]


@dataclass(frozen=True)
class Collected:
    """What a rank has of a step before ranks have told each other of weights and records.

    Attributes:
        segments: The flat sums, not divided yet, as in `Reduced`; also those that this rank is a
            shadow of. They are the reducer's own memory, valid until the next `begin`.
        rows: Of each micro-batch of this rank its index, its weight and what was recorded.
        touched: The parameters that this rank's micro-batches had a gradient for.
    """

    segments: "dict[layout.Segment, torch.Tensor]"
    rows: list[tuple[int, float, list[float]]]
    touched: set[str]


@dataclass(frozen=True)
class Reduced:
    """What came of a step.

    Attributes:
        segments: The flat sums, divided by `weight`, in float32 (float64 for float64): of all
            segments, or of those that this rank owns. They are valid until the next `begin`.
        weight: The sum of the weights of all micro-batches.
        weights: The weight of each micro-batch, in order.
        values: What was recorded of each micro-batch, in order.
        touched: The parameters that any micro-batch had a gradient for.
    """

    segments: "dict[layout.Segment, torch.Tensor]"
    weight: float
    weights: list[float]
    values: list[list[float]]
    touched: set[str]

    def mean(self, column: int) -> float:
        """The weighted mean over micro-batches of a column of `values`."""
        return weighted_mean(self.weights, [row[column] for row in self.values])

    def assign(self, parameters: "Mapping[str, torch.Tensor]") -> None:
        """Sets `.grad` of parameters whose segments are all here, in the parameter's own dtype.

        One that no micro-batch of any rank touched gets None, as torch would leave it.
        """
        import torch

        for name, parameter in parameters.items():
            parameter.grad = None
            if name in self.touched:
                parameter.grad = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=parameter.device
                )
        for segment, value in self.segments.items():
            grad = parameters[segment.name].grad
            if grad is not None:
                grad.view(-1)[segment.start : segment.stop].copy_(value)


class GradientReducer:
    """Sums gradients over micro-batches and ranks along a fixed tree, while backward runs.

    The result does not depend on the number of ranks, nor on which of them computed what. It is for
    one set of ranks: after a change make another, with a new transport. Beyond the gradients in
    `.grad`, a rank holds `slots` times the model's size in float32, and one more for the result.

    Args:
        parameters: Name -> parameter; those that need no gradient are left out, unless `segments`
            have them: they may have been frozen for a while.
        micro_batches: Number of micro-batches of a step, over all ranks.
        assignment: Who computes which leaves.
        transport: The ranks. The reducer uses it from a thread of its own until `close`. For CUDA
            parameters a `Staged` one.
        group: Micro-batches of a leaf, which are added from left to right. It is part of what
            fixes the bits, and must not depend on the number of ranks.
        segments: Where each run of elements is kept (ZeRO): then only this rank's come back. None
            for all on all ranks.
        consistency: "bitwise", or "fast": each rank adds up what it has, and the ranks' sums are
            added in whatever order is fastest.
        columns: How many numbers `record` is given for each micro-batch.
        whole: Whether all ranks get all segments, whoever owns them; by default where none has an
            owner.
        ordered: Whether buckets go one after the other, as NCCL wants it.
        bucket_bytes: Size of a bucket, about.
        before: A reducer that was closed, whose memory is used again; what it gave out is not valid
            any more.
        check: Called as gradients come; what it raises ends the backward pass.

    Attributes:
        order: This rank's micro-batches, in the order that they must be computed in.
        slots: How many sums are open at a time, at most: floor(log2(leaves)) + 1 or fewer.

    Raises:
        ConfigError: The arguments do not fit each other.
        NotSupportedError: A parameter is of a dtype that cannot be summed, or parameters are on
            several devices, or on others than the CPU and CUDA.
    """

    def __init__(
        self,
        parameters: "Mapping[str, torch.Tensor]",
        micro_batches: int,
        assignment: Assignment,
        transport: Transport,
        *,
        group: int = 1,
        segments: Sequence[layout.Segment] | None = None,
        consistency: Consistency = "bitwise",
        columns: int = 0,
        whole: bool | None = None,
        ordered: bool = False,
        bucket_bytes: int = layout.BUCKET_BYTES,
        before: "GradientReducer | None" = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        kept = {segment.name for segment in segments or ()}
        self._parameters = {n: p for n, p in parameters.items() if p.requires_grad or n in kept}
        self._check(micro_batches, assignment, group, consistency)
        self._micro_batches, self._group, self._columns = micro_batches, group, columns
        self._assignment, self._transport = assignment, transport
        self._fast, self._look_up = consistency == "fast", check
        self._whole = segments is None if whole is None else whole
        own = assignment.nodes[transport.rank]
        self._shares = [self._indices(assignment.leaves_of(r)) for r in range(transport.size)]
        self.order = self._shares[transport.rank]
        if self._fast:
            # One leaf a rank that computes: all that it has, from left to right.
            busy = [r for r, share_ in enumerate(self._shares) if share_]
            place = {r: (Node(i, i + 1),) for i, r in enumerate(busy)}
            nodes = tuple(place.get(r, ()) for r in range(transport.size))
            assignment = Assignment(len(busy), nodes)
            own = assignment.nodes[transport.rank]
        plan = plan_slots(own, direct=group == 1)
        self.slots = plan.slots
        self._plans: list[LeafPlan] = list(plan.leaves)
        self._memory = memory = Memory()
        if before is not None:
            before._leave(memory)
        self._exchange = Exchange(assignment, transport, memory)
        if segments is None:
            segments = layout.whole_segments(self._parameters)
        self._buckets = [
            BucketSums(
                bucket,
                self._parameters,
                plan,
                transport.rank,
                whole=self._whole,
                memory=memory,
            )
            for bucket in layout.make_buckets(
                self._parameters, segments, transport.size, bucket_bytes=bucket_bytes
            )
        ]
        self._of = {n: [b for b in self._buckets if n in b.names] for n in self._parameters}
        self._thread = ReductionThread(ordered=ordered)
        self._hooks = [self._hook(name, p) for name, p in self._parameters.items()]
        self._deadline: Deadline | None = None
        self._current: int | None = None
        self._failed = False

    def begin(self, deadline: Deadline) -> None:
        """Begins a step; what an earlier one that was not finished has left is forgotten.

        Args:
            deadline: Until when the step's gradients must be there, on all ranks.

        Raises:
            CollectiveError: An earlier step failed between ranks: make a new reducer.
            ConfigError: An earlier step stopped half-way, with buckets sent already.
        """
        if self._thread.error is not None:
            raise self._thread.error
        if self.spoiled:
            raise ConfigError("a step was given up after its sum had begun: make a new reducer")
        for bucket in self._buckets:
            bucket.begin()
        self._deadline, self._position = deadline, 0
        self._rows: list[list[float]] = []
        self._touched: set[str] = set()
        self._ready, self._next = set[int](), 0
        if not self.order:
            for bucket in self._buckets:
                self._send(bucket)

    @contextmanager
    def micro_batch(self, index: int, weight: float = 1.0) -> Iterator[None]:
        """A block that computes one micro-batch: `backward()` once, of the loss times the weight.

        It begins and ends without any `.grad`: gradients are taken out as they come. A micro-batch
        without samples is an empty block, with a weight of 0.

        Args:
            index: The micro-batch; they come in the order of `order`.
            weight: What its gradient counts.

        Raises:
            ConfigError: It is another one's turn, or a parameter got a gradient twice.
        """
        if self._deadline is None or self._position >= len(self.order):
            raise ConfigError("begin() comes first, and no more micro-batches than in `order`")
        if index != self.order[self._position]:
            raise ConfigError(
                f"micro-batch {index} is out of turn: {self.order[self._position]} is next"
            )
        self._current, self._fired, self._weight = index, set[str](), weight
        self._last = self._position == len(self.order) - 1
        self._place = self._find_place()
        for parameter in self._parameters.values():
            parameter.grad = None  # backward would add to what is there
        try:
            yield
        except BaseException:
            self._failed = any(b.sent for b in self._buckets)
            self._position = len(self.order)
            raise
        finally:
            self._current = None
        for name in self._parameters:
            if name not in self._fired:
                self._take(name, None)
        self._touched |= self._fired
        self._rows.append([float(self._weight), *[0.0] * self._columns])
        self._position += 1

    def weigh(self, weight: float) -> None:
        """Says within a micro-batch what its gradient counts, where that is known only then."""
        self._weight = weight

    def record(self, values: Sequence[float]) -> None:
        """Notes numbers of the micro-batch that has just ended, such as its loss."""
        if not self._rows or len(values) != self._columns:
            raise ConfigError(f"{len(values)} values, where {self._columns} are due")
        self._rows[-1][1:] = map(float, values)

    def finish(self) -> Reduced:
        """Waits for the sums, and returns them divided by the total weight.

        Raises:
            CollectiveError: A rank is gone. Parameters and `.grad` are as before the step.
            DeadlineError: Some rank did not do its part in time; likewise.
            ConfigError: Not all micro-batches of this rank were computed, or all weights are 0.
        """
        deadline = self._deadline
        mine = self.collect()
        assert deadline is not None
        self._failed = True  # until it has not
        rows, touched = self._share(mine, deadline)
        weights = [row[0] for row in rows]
        total = ordered_sum(weights)
        if not total:
            raise ConfigError("the weights of all micro-batches are 0: there is no mean gradient")
        for bucket in self._buckets:
            for result in bucket.results() if total != 1.0 else ():
                result.div_(total)
        self._failed = False
        return Reduced(mine.segments, total, weights, [row[1:] for row in rows], touched)

    def collect(self) -> Collected:
        """Waits for the sums of this rank's part, and tells the others nothing; see `finish`.

        Raises:
            CollectiveError: A rank is gone. Parameters and `.grad` are as before the step.
            DeadlineError: Some rank did not do its part in time; likewise.
            ConfigError: Not all micro-batches of this rank were computed.
        """
        deadline = self._deadline
        if deadline is None or len(self._rows) != len(self.order):
            raise ConfigError("finish() comes after all micro-batches of `order`")
        self._deadline = None
        self._failed = True  # until it has not
        self._thread.wait(deadline)
        segments: dict[layout.Segment, torch.Tensor] = {}
        for bucket in self._buckets:
            bucket.sent = False
            segments.update(bucket.segments())
        self._failed = False
        self._memory.clear()  # all that a step needs is taken by now
        rows = [(i, row[0], row[1:]) for i, row in zip(self.order, self._rows, strict=True)]
        return Collected(segments, rows, set(self._touched))

    @property
    def spoiled(self) -> bool:
        """Whether no step can begin any more: one was given up after its sum had begun."""
        begun = self._failed or any(bucket.sent for bucket in self._buckets)
        return begun or self._thread.error is not None

    def close(self) -> None:
        """Ends the thread and takes the hooks off. The transport is the caller's."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._thread.close()

    def _leave(self, memory: Memory) -> None:
        self._exchange.leave(memory)
        for bucket in self._buckets:
            bucket.leave(memory)
        self._buckets = []

    def _hook(self, name: str, parameter: Any) -> Any:
        def fired(p: "torch.Tensor") -> None:
            if self._current is None:
                return  # not ours: an evaluation, another model's training
            # First: whatever ends the pass leaves no part of a gradient.
            grad, p.grad = p.grad, None
            self._look_up()
            if name in self._fired:
                raise ConfigError(
                    f"{name!r} got a second gradient in micro-batch {self._current}: call "
                    "backward() once a micro-batch, on the sum of the losses"
                )
            if grad is None or grad.is_sparse:
                raise NotSupportedError(f"{name!r} has a sparse gradient: use sparse=False")
            self._fired.add(name)
            self._take(name, grad)

        # torch takes no hook for one that is frozen, and keeps those of one that is frozen later.
        frozen = not parameter.requires_grad
        try:
            return parameter.requires_grad_().register_post_accumulate_grad_hook(fired)
        finally:
            parameter.requires_grad_(not frozen)

    def _take(self, name: str, grad: "torch.Tensor | None") -> None:
        """Adds a parameter's gradient to its buckets, and sends those that are complete."""
        leaf, place, plan = self._place
        for bucket in self._of[name]:
            bucket.add(name, grad, plan, first=place == 0)
            if len(bucket.waiting) == 0:
                bucket.complete(plan, leaf_done=leaf)
                if self._last:
                    self._send_in_order(bucket)

    def _find_place(self) -> tuple[bool, int, LeafPlan]:
        """Whether this micro-batch ends its leaf, its place in it, and the leaf's plan."""
        if self._fast:
            return self._last, self._position, self._plans[0]
        index = self.order[self._position]
        place = index % self._group
        last = place == self._group - 1 or index == self._micro_batches - 1
        return last, place, self._plans[self._leaf_number(self._position)]

    def _leaf_number(self, position: int) -> int:
        # All leaves have `group` micro-batches, but for the step's last one.
        short = -(-self._micro_batches // self._group) * self._group - self._micro_batches
        leaf = self._micro_batches // self._group if short else -1
        seen = 0
        for number, plan in enumerate(self._plans):
            seen += self._group - (short if plan.leaf == leaf else 0)
            if position < seen:
                return number
        raise ConfigError("more micro-batches than this rank has")

    def _send_in_order(self, bucket: BucketSums) -> None:
        """Sends what is complete, in the order of the buckets: ranks that finish them in others
        (a parameter is used by some micro-batches alone) would wait for each other for ever."""
        self._ready.add(bucket.number)
        while self._next in self._ready:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: BucketSums) -> None:
        bucket.sent = True
        assert self._deadline is not None

        device = self._device
        computed = mark(device)

        def start() -> Complete:
            computed()
            complete = begin()

            def settled(deadline: Deadline) -> Wait | None:
                wait = complete(deadline)
                settle(device)
                return wait

            return settled

        def begin() -> Complete:
            if self._fast and self._whole:
                mine = next(iter(bucket.sums().values()), None)
                if mine is None:
                    bucket.result.zero_()
                else:
                    bucket.result.copy_(mine)
                wait = self._transport.all_reduce(bucket.result)
                return lambda deadline: wait(deadline)
            return self._exchange.start(
                bucket.number,
                bucket.sums(),
                bucket.bounds,
                bucket.result,
                whole=self._whole,
                mirror=bucket.mirror,
            )

        self._thread.submit(start, self._deadline)

    def _share(self, own: Collected, deadline: Deadline) -> tuple[list[list[float]], set[str]]:
        """Weights and records of all micro-batches, in order; which parameters were touched."""
        import torch

        names, width = list(self._parameters), 1 + self._columns
        mine = [float(name in own.touched) for name in names]
        mine += [value for _, weight, values in own.rows for value in (weight, *values)]
        sizes = [len(names) + len(share_) * width for share_ in self._shares]
        told = share(self._transport, torch.tensor(mine, dtype=torch.float64), sizes, deadline)
        rows: list[list[float]] = [[]] * self._micro_batches
        touched: set[str] = set()
        for indices, numbers in zip(self._shares, told, strict=True):
            flags, rest = numbers[: len(names)].tolist(), numbers[len(names) :].tolist()
            touched.update(name for name, flag in zip(names, flags, strict=True) if flag)
            for i, index in enumerate(indices):
                rows[index] = rest[i * width : (i + 1) * width]
        return rows, touched

    def _indices(self, leaves: Sequence[int]) -> list[int]:
        size, most = self._group, self._micro_batches
        return [i for leaf in leaves for i in range(leaf * size, min((leaf + 1) * size, most))]

    def _check(
        self, micro_batches: int, assignment: Assignment, group: int, consistency: str
    ) -> None:
        if not self._parameters:
            raise ConfigError("no parameter needs a gradient")
        if group < 1 or -(-micro_batches // group) != assignment.leaves:
            raise ConfigError(
                f"{micro_batches} micro-batches in groups of {group} do not make the "
                f"{assignment.leaves} leaves of the assignment"
            )
        if consistency not in ("bitwise", "fast"):
            raise ConfigError(f"consistency={consistency!r}: choose 'bitwise' or 'fast'")
        self._device = next(iter(self._parameters.values())).device
        for name, parameter in self._parameters.items():
            if parameter.device != self._device or self._device.type not in ("cpu", "cuda"):
                raise NotSupportedError(
                    f"{name!r} is on {parameter.device}: all parameters have to be on the CPU, or "
                    "on one CUDA device"
                )
