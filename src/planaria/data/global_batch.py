"""The global batch: what a training loop iterates over, and what a checkpoint keeps of it."""

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from operator import index
from typing import Any

from planaria import telemetry
from planaria.data.feed import Feed, Fetcher, InlineFeed, Key, WorkerFeed
from planaria.data.order import MAX_LENGTH, MapOrder, StreamOrder, cut
from planaria.errors import ConfigError, MismatchError, NotSupportedError


class GlobalBatch:
    """A global batch that is a fixed set of micro-batches, whoever computes them.

    The samples of micro-batch `i` of step `s` are a function of (s, i) alone, never of a rank or of
    the number of ranks, and so is the randomness that they are read with: python's, numpy's and
    torch's generators are seeded with `micro_batch_seed(seed, s, i)` while the dataset is asked
    and given back afterwards. Ranks only divide the micro-batches among them, and any number of
    ranks may go on where any other number stopped: each sample is still read exactly once.

    ::

        data = GlobalBatch(dataset, batch_size=64, micro_batch_size=8, epochs=3)
        for batch in data:              # this rank's share of each step, collated
            ...
        state = data.state_dict()       # the position: at the end of the loop's body, the next step

    A map-style dataset (`__len__` and `__getitem__`) is read in epochs, each with a permutation of
    its own. Everything else that is iterable is read through logical workers, one for each
    micro-batch of a step (see `planaria.data.streams.Stream`): it is endless, keeps its own order
    (`shuffle`, `drop_last` have no effect), and to resume at step `s` costs reading what lies
    before `s` once more, unless it offers `skip(n)`. It must yield the same elements in every
    process: no sharding by rank or worker of its own.

    A loop over `data` gives every rank its whole share at once, so ranks whose shares differ in
    size weigh samples differently in a plain mean of gradients; use world sizes that divide the
    number of micro-batches, or `micro_batches`. And a `collate_fn` that draws random numbers sees
    the same ones at any world size only in `micro_batches` and `load`.

    Args:
        dataset: Map-style or iterable. A `fingerprint` attribute, if it is a string, becomes part
            of the saved position, so that other data is refused.
        batch_size: Samples of a step over all ranks.
        micro_batch_size: Samples of a micro-batch; must divide `batch_size`.
        seed: Seed of the order and of all randomness in reading.
        collate_fn: Makes one batch of a list of samples; None for torch's `default_collate`.
        num_workers: Processes that read ahead; 0 reads when asked. The order and the position are
            the same. Of an iterable, each stream is read by one process: a loop over `data`
            uses one in all, `micro_batches` at most as many as it has micro-batches.
        drop_last: Leave out the samples that do not fill the last step of an epoch. Otherwise that
            step is short, spread evenly over all micro-batches, some of which may be empty.
        shuffle: Permute each epoch; otherwise the dataset's own order.
        steps: Steps of the run, counted from its very start; None for endless.
        epochs: The same in epochs; for map-style datasets. Give one of them at most.
        rank: Rank of this process among those that share the batch, where that is not the rank in
            the job (tensor parallelism); None for the job's.
        world_size: Number of processes that share the batch; give both or none.
        timeout: Seconds to wait for one batch of the workers.
        multiprocessing_context: Start method of the workers; None for torch's own.

    Attributes:
        step: The position: number of the step that a loop yields next. It is moved *before* a
            batch is handed out, and may be set.

    Raises:
        ConfigError: An argument is wrong, or the dataset cannot fill a step.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 64,
        micro_batch_size: int = 8,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        drop_last: bool = True,
        shuffle: bool = True,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        timeout: float = 600.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        batch_size = _integer("batch_size", batch_size, 1)
        micro_batch_size = _integer("micro_batch_size", micro_batch_size, 1)
        seed = _integer("seed", seed)
        if batch_size % micro_batch_size:
            raise ConfigError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size}: a step is a whole number of equal micro-batches"
            )
        if not timeout > 0:
            raise ConfigError(f"timeout is {timeout!r}: give seconds above 0")
        self._order: MapOrder | StreamOrder
        if _is_stream(dataset):
            self._order = StreamOrder(batch_size, micro_batch_size, seed)
        else:
            self._order = MapOrder(
                len(dataset), batch_size, micro_batch_size, seed, bool(shuffle), bool(drop_last)
            )
            _check_length(self._order)
        self._dataset, self._collate_fn = dataset, collate_fn
        self._num_workers = _integer("num_workers", num_workers, 0)
        self._timeout, self._context = float(timeout), multiprocessing_context
        self._total = self._end(steps, epochs)
        if (rank is None) != (world_size is None):
            raise ConfigError("give both rank and world_size, or neither")
        self._fixed_place = None
        if rank is not None and world_size is not None:
            self._fixed_place = (index(rank), index(world_size))
            self.assign(*self._fixed_place)
        self._inline = InlineFeed(self._fetcher())
        self._ahead: tuple[tuple[int, ...], Feed] | None = None
        self.step = 0

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self._order.n_micro_batches

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None for an iterable dataset, whose epochs have no common length."""
        return self._order.steps_per_epoch

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, wherever the position is; None if endless."""
        return self._total

    def __len__(self) -> int:
        """Returns the steps of the whole run, wherever the position is.

        Raises:
            TypeError: The data is endless: neither `steps` nor `epochs` was given.
        """
        if self._total is None:
            raise TypeError("this GlobalBatch is endless: give steps= or epochs= to bound it")
        return self._total

    def __bool__(self) -> bool:
        return True

    def indices(self, step: int, micro_batch: int) -> list[int]:
        """Returns the indices of a micro-batch's samples in a map-style dataset: a pure function.

        Args:
            step: Number of the step, from 0, over all epochs.
            micro_batch: Index of the micro-batch in the step.

        Raises:
            ConfigError: No such step or micro-batch.
            NotSupportedError: The dataset is iterable: its elements have no indices.
        """
        self._check_key(step, micro_batch)
        if isinstance(self._order, StreamOrder):
            raise NotSupportedError("an iterable dataset has no indices; use load(step, i)")
        return self._order.indices(step, micro_batch)

    def assign(self, rank: int, world_size: int) -> range:
        """Returns the micro-batches of a rank: contiguous, in sizes that differ by at most 1.

        Raises:
            ConfigError: There are more ranks than micro-batches, or no such rank.
        """
        if not 1 <= world_size <= self.n_micro_batches:
            raise ConfigError(
                f"world size {world_size} cannot share the {self.n_micro_batches} micro-batches "
                f"of a step: 1 to {self.n_micro_batches} ranks can; for more, make "
                "micro_batch_size smaller"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}: give 0 to {world_size - 1}")
        return cut(self.n_micro_batches, world_size, rank)

    def load(self, step: int, micro_batch: int) -> Any:
        """Reads and collates one micro-batch, in this process. It does not move the position.

        Raises:
            ConfigError: No such step or micro-batch, or it is empty (`drop_last=False`).
        """
        self._check_key(step, micro_batch)
        if not self._order.size(step, micro_batch):
            raise ConfigError(
                f"micro-batch {micro_batch} of step {step} is empty: the last step of an epoch is "
                "short with drop_last=False; `micro_batches` leaves out what is empty"
            )
        return self._inline.get((step, (micro_batch,)))

    def micro_batches(
        self,
        step: int,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        order: Sequence[int] | None = None,
    ) -> Generator[tuple[int, Any], None, None]:
        """Reads the micro-batches of a rank one by one. It does not move the position.

        With workers, the following steps are read ahead, until `close` or another rank or world
        size.

        Args:
            step: Number of the step.
            rank: Rank; None for this process's.
            world_size: Number of ranks; give both or none.
            order: Which micro-batches, and in which order, in place of a rank's.

        Yields:
            Index and collated batch of each micro-batch that is not empty.

        Raises:
            ConfigError: No such step or rank.
            DeadlineError: The workers did not deliver in time.
        """
        if (rank is None) != (world_size is None):
            raise ConfigError("give both rank and world_size, or neither")
        if order is not None:
            if rank is not None:
                raise ConfigError("give order, or rank and world_size, not both")
            share = tuple(order)
        elif rank is None or world_size is None:
            share = tuple(self.assign(*self._place()))
        else:
            share = tuple(self.assign(rank, world_size))
        for i in share or (0,):
            self._check_key(step, i)
        return self._micro_batches(step, share)

    def __iter__(self) -> Generator[Any, None, None]:
        """Yields this rank's share of each step as one collated batch, from the position on.

        Rank and world size are those of the moment the loop starts.

        Raises:
            ConfigError: The world size is impossible, or it leaves a rank without samples in the
                short last step of an epoch.
            DeadlineError: The workers did not deliver in time.
        """
        rank, world_size = self._place()
        share = self.assign(rank, world_size)
        self._refuse_idle_ranks(world_size)
        return self._shares(tuple(share))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and what the order depends on: small and JSON-able."""
        return {"step": self.step, "order": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; loops that are running go on from there.

        Raises:
            MismatchError: The position belongs to another order of samples. Nothing was changed.
        """
        step, saved = state.get("step"), state.get("order")
        if not isinstance(step, int) or step < 0 or not isinstance(saved, Mapping):
            raise MismatchError(f"not a position of a GlobalBatch: {str(dict(state))[:200]}")
        mine = self._fingerprint()
        differences = [
            f"{name} was {saved.get(name)!r}, is {mine.get(name)!r}"
            for name in sorted(saved.keys() | mine.keys())
            if saved.get(name) != mine.get(name)
        ]
        if differences:
            raise MismatchError(
                "the order of the samples is not the one that the position was saved in: "
                f"{'; '.join(differences)}. Use the saved values and data, or start a new run"
            )
        self.step = step

    def close(self) -> None:
        """Ends the workers that read ahead for `micro_batches`. It may be called again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].close()

    def _shares(self, share: tuple[int, ...]) -> Generator[Any, None, None]:
        feed = self._open_feed((share,))
        try:
            while self._total is None or self.step < self._total:
                step = self.step
                with telemetry.span("data.wait", step=step):
                    batch = feed.get((step, share))
                self.step = step + 1
                yield batch
        finally:
            feed.close()

    def _micro_batches(
        self, step: int, share: tuple[int, ...]
    ) -> Generator[tuple[int, Any], None, None]:
        for i in share:
            if self._order.size(step, i):
                with telemetry.span("data.wait", step=step):
                    batch = self._feed_ahead(share).get((step, (i,)))
                yield i, batch

    def _feed_ahead(self, share: tuple[int, ...]) -> Feed:
        if self._ahead is None or self._ahead[0] != share:
            self.close()
            self._ahead = share, self._open_feed(tuple((i,) for i in share))
        return self._ahead[1]

    def _open_feed(self, units: tuple[tuple[int, ...], ...]) -> Feed:
        """Opens a feed for a loop that asks for these sets of micro-batches in each step."""
        workers = self._num_workers
        if isinstance(self._order, StreamOrder):
            # Workers take keys in turn, and each stream should stay with one of them.
            workers = max((w for w in range(1, workers + 1) if len(units) % w == 0), default=0)
        if not workers:
            return self._inline
        return WorkerFeed(
            self._fetcher(),
            lambda key: self._keys_from(key, units),
            workers,
            self._timeout,
            self._context,
        )

    def _keys_from(self, key: Key, units: tuple[tuple[int, ...], ...]) -> Iterator[Key]:
        step, unit = key[0], units.index(key[1])
        while self._total is None or step < max(self._total, key[0] + 1):
            for micro_batches in units[unit:]:
                if any(self._order.size(step, i) for i in micro_batches):
                    yield step, micro_batches
            step, unit = step + 1, 0

    def _fetcher(self) -> Fetcher:
        return Fetcher(self._dataset, self._order, self._collate_fn)

    def _fingerprint(self) -> dict[str, Any]:
        fingerprint = self._order.fingerprint()
        content = getattr(self._dataset, "fingerprint", None)
        return {**fingerprint, "dataset": content} if isinstance(content, str) else fingerprint

    def _end(self, steps: int | None, epochs: int | None) -> int | None:
        if steps is not None and epochs is not None:
            raise ConfigError("give steps= or epochs=, not both")
        if epochs is None:
            return None if steps is None else _integer("steps", steps, 0)
        if self.steps_per_epoch is None:
            raise ConfigError("epochs= needs a dataset with a length; give steps=")
        return _integer("epochs", epochs, 0) * self.steps_per_epoch

    def _check_key(self, step: int, micro_batch: int) -> None:
        if step < 0:
            raise ConfigError(f"step {step}: steps count from 0")
        if not 0 <= micro_batch < self.n_micro_batches:
            raise ConfigError(
                f"micro-batch {micro_batch}: a step has 0 to {self.n_micro_batches - 1}"
            )

    def _refuse_idle_ranks(self, world_size: int) -> None:
        if self.steps_per_epoch is None:
            return
        last = self.steps_per_epoch - 1
        for rank in range(world_size):
            if not any(self._order.size(last, i) for i in self.assign(rank, world_size)):
                raise ConfigError(
                    f"the last step of an epoch is too short for {world_size} ranks: rank {rank} "
                    "would have no sample. Use drop_last=True, fewer ranks, or `micro_batches`"
                )

    def _place(self) -> tuple[int, int]:
        return self._fixed_place or _place_in_job()


def _place_in_job() -> tuple[int, int]:
    """Returns rank and world size: torch.distributed's, else the launcher's, else 0 of 1."""
    # Looked up, not imported: what was never imported is not initialised either.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(world_size)
    except ValueError:
        raise ConfigError(
            f"the environment has RANK={rank!r} and WORLD_SIZE={world_size!r}: give integers"
        ) from None


def _is_stream(dataset: Any) -> bool:
    torch_data = sys.modules.get("torch.utils.data")
    # A subclass of torch's IterableDataset inherits a __getitem__ that only raises.
    stream = torch_data is not None and isinstance(dataset, torch_data.IterableDataset)
    if not stream and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return False
    if hasattr(dataset, "__next__"):
        raise ConfigError(
            f"a {type(dataset).__name__} can be read only once, so it cannot be resumed or shared "
            "by ranks; give an object whose __iter__ starts anew each time"
        )
    if not stream and not hasattr(dataset, "__iter__"):
        raise ConfigError(
            f"a {type(dataset).__name__} is no dataset: it needs __len__ and __getitem__, or "
            "__iter__"
        )
    return True


def _check_length(order: MapOrder) -> None:
    if not 1 <= order.length <= MAX_LENGTH:
        raise ConfigError(f"the dataset has {order.length} samples: give 1 to 2**62")
    if not order.steps_per_epoch:
        raise ConfigError(
            f"the dataset has {order.length} samples, fewer than batch_size {order.batch_size}: "
            "make batch_size smaller, or use drop_last=False"
        )


def _integer(name: str, value: Any, least: int | None = None) -> int:
    try:
        number = index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}: give an integer") from None
    if least is not None and number < least:
        raise ConfigError(f"{name} is {number}: give {least} or more")
    return number
