"""What one node holds: images, parity, and how far each snapshot has come.

At most one committed snapshot and one on its way are kept; the older one's memory is free for the
next only once the newer one is committed here. So at every moment one whole snapshot exists.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from planaria.checkpoint.memory.held import Held, Image, Outcome, State
from planaria.checkpoint.memory.memory import Key, Member, Memory, Span
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, MemoryBudgetError, NotCommittedError, SaveFailedError

# Of so many snapshots it is remembered how they ended, for those who ask late.
_REMEMBERED = 256
# Nodes hear of a commit one after the other: so far apart, at most, where none is lost.
_MOVES_S = 5.0


class Holdings:
    """The snapshots of one node. Thread-safe; `changed` guards all of it and tells of changes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.changed = threading.Condition(threading.RLock())
        self.sequence = 0  #: the highest that was ever seen
        self._held: dict[Key, Held] = {}
        self._outcomes: OrderedDict[Key, Outcome] = OrderedDict()
        self._orphans: list[Held] = []
        self._copies: dict[Key, Key] = {}  # what was made whole again, and as what
        self._answer = threading.local()

    def all(self) -> list[Held]:
        """Everything that is held."""
        with self.changed:
            return list(self._held.values())

    def find(self, key: Key) -> Held | None:
        """What is held of a snapshot, if anything."""
        with self.changed:
            return self._held.get(key)

    def get(self, key: Key) -> Held:
        """What is held of a snapshot.

        Raises:
            NotCommittedError: Nothing, or nothing any more.
        """
        with self.changed:
            held = self._held.get(key)
            if held is None:
                raise NotCommittedError(f"{key} is not held here{self._how_it_ended(key)}")
            return held

    def entry(self, key: Key, members: Sequence[Member]) -> Held:
        """What is held of a snapshot that is on its way; begins to hold it.

        Raises:
            SaveFailedError: It has failed.
        """
        with self.changed:
            outcome = self._outcomes.get(key)
            if outcome is not None and (outcome.why or key not in self._held):
                raise SaveFailedError(f"snapshot of {key} is over{self._how_it_ended(key)}")
            if key not in self._held:
                self._held[key] = Held(key, tuple(members))
            return self._held[key]

    def now(self, key: Key) -> Key:
        """What a snapshot is called now: another one may have taken its place, with its bytes."""
        with self.changed:
            while key not in self._held and key in self._copies:
                key = self._copies[key]
            return key

    def moved(self, key: Key, deadline: Deadline) -> Key | None:
        """What has taken, or just takes, the place of a snapshot that could not be read; if any."""
        within = Deadline(min(_MOVES_S, deadline.remaining()))
        with self.changed:
            while self.now(key) == key:
                coming = any(held.mends == key for held in self.unfinished())
                if not coming or within.expired:
                    return None
                self.changed.wait(min(within.timeout(), 0.1))
            return self.now(key)

    def outcome(self, key: Key) -> Outcome | None:
        """How a snapshot ended, None if it has not, or if nothing is known of it."""
        with self.changed:
            return self._outcomes.get(key)

    def committed(self) -> Key | None:
        """The snapshot that is committed here, if one is."""
        with self.changed:
            done = (held.key for held in self._held.values() if held.state == State.COMMITTED)
            return next(done, None)

    def unfinished(self, but: Key | None = None) -> list[Held]:
        """What is on its way."""
        with self.changed:
            return [
                held
                for held in self._held.values()
                if held.key != but and held.state < State.COMMITTED
            ]

    def allocate(self, nbytes: int, deadline: Deadline, what: str) -> Span:
        """Takes memory; waits for what a reader still uses of a snapshot that is otherwise gone.

        Raises:
            MemoryBudgetError: There is no room, and none to come.
            DeadlineError: A reader did not let go in time.
        """
        with self.changed:
            while True:
                try:
                    return self.memory.allocate(nbytes)
                except MemoryBudgetError:
                    if not self._orphans:
                        raise
                keys = ", ".join(str(held.key) for held in self._orphans)
                self.wait_changed(
                    deadline, f"memory for {what}, which readers or writers of {keys} still use"
                )

    def image(
        self, key: Key, members: Sequence[Member], name: str, nbytes: int, span: Span
    ) -> Span:
        """Takes in an image that is going to be written; a span that is not used is given back.

        Raises:
            ConfigError: There is another one of this name already.
            SaveFailedError: The snapshot has failed.
        """
        with self.changed:
            try:
                held = self.entry(key, members)
                image = held.images.get(name)
                if image is None:
                    held.images[name] = Image(span)
                    held.pins += 1
                    return span
                if held.state != State.CAPTURING or image.span.nbytes != nbytes or image.file:
                    raise ConfigError(f"{name} of {key} was begun already")
            except BaseException:
                self.memory.free(span)
                raise
            self.memory.free(span)
            return image.span

    def end_lending(self, key: Key, name: str) -> None:
        """Notes that the rank of an image will not write to it any more; harmless twice."""
        with self.changed:
            held = self._held.get(key) or self.orphan(key)
            image = held.images.get(name) if held is not None else None
            if held is not None and image is not None and image.lent:
                image.lent = False
                self.unpin(held)

    def commit(self, key: Key) -> None:
        """Commits a snapshot that is prepared; what was committed before is forgotten.

        Raises:
            NotCommittedError: It is not held.
            SaveFailedError: It has failed, or is not prepared.
        """
        with self.changed:
            held = self.get(key)
            if held.state < State.PREPARED:
                raise SaveFailedError(f"{key} cannot be committed: it is {held.state.name.lower()}")
            if held.state == State.PREPARED:
                for older in self.all():
                    if older.state == State.COMMITTED:
                        self._remove(older)
                held.state = State.COMMITTED
                if held.mends is not None:
                    self._copies = {**dict(list(self._copies.items())[-8:]), held.mends: key}
                self._remember(key, Outcome(committed=True))
                self.changed.notify_all()

    def complete(self, key: Key, why: str = "") -> None:
        """Notes that all nodes have committed a snapshot, or why that is not known."""
        with self.changed:
            outcome = self._outcomes.get(key)
            if outcome is not None and outcome.committed and not outcome.complete:
                self._remember(key, Outcome(committed=True, complete=not why, why=why))
                self.changed.notify_all()

    def fail(self, key: Key, why: str, at_most: State = State.PREPARED) -> None:
        """Forgets a snapshot that has not come further than `at_most`; it will never be committed.

        What is prepared may be committed elsewhere: it is failed on the leader's word, or when it
        is certain that nobody has committed it.
        """
        with self.changed:
            held = self._held.get(key)
            if held is not None and held.state > at_most:
                return
            if held is not None:
                self._remove(held)
            if key not in self._outcomes:
                self._remember(key, Outcome(committed=False, why=why))
            self.changed.notify_all()

    @contextmanager
    def pinned(self, key: Key) -> Iterator[Held]:
        """Keeps a snapshot's memory as it is for a block.

        Raises:
            NotCommittedError: It is not held.
        """
        held = self.pin(key)
        try:
            yield held
        finally:
            self.unpin(held)

    def pin(self, key: Key) -> Held:
        """Keeps a snapshot's memory as it is until `unpin`.

        Raises:
            NotCommittedError: It is not held.
        """
        with self.changed:
            held = self.get(key)
            held.pins += 1
            return held

    def unpin(self, held: Held) -> None:
        """Ends one `pin`."""
        with self.changed:
            held.pins -= 1
            if held.dropped and held.pins == 0:
                self._orphans.remove(held)
                self._free(held)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A block in which a request is answered: what the answer refers to is pinned until then.

        So bytes can be sent from where they lie; without it they are copied first.
        """
        self._answer.pins = []
        try:
            yield
        finally:
            pins, self._answer.pins = self._answer.pins, None
            for held in pins:
                self.unpin(held)

    def refer(self, held: Held) -> bool:
        """Pins a snapshot until this thread's answer is sent, if it says when that is."""
        pins = getattr(self._answer, "pins", None)
        if pins is None:
            return False
        with self.changed:
            held.pins += 1
            pins.append(held)
        return True

    def orphan(self, key: Key) -> Held | None:
        """A snapshot that is gone but for its readers."""
        with self.changed:
            return next((held for held in self._orphans if held.key == key), None)

    def prepare(self, key: Key) -> bool:
        """Turns a sealed snapshot that has all its parts to a prepared one; whether it just did."""
        with self.changed:
            held = self._held.get(key)
            if (
                held is None
                or held.state != State.SEALED
                or held.meta is None
                or held.manifest is None
                or not held.encoded
                or not all(parity.complete for parity in held.parity.values())
            ):
                return False
            held.state = State.PREPARED
            self.changed.notify_all()
            return True

    def wait_changed(self, deadline: Deadline, what: str, at_most: float = 1.0) -> None:
        """Waits for a change, a while at most; the caller holds `changed`."""
        deadline.check(what)
        self.changed.wait(min(deadline.timeout(), at_most))

    def clear(self) -> None:
        """Forgets everything that nobody reads."""
        with self.changed:
            for held in self.all():
                self._remove(held)
            self.changed.notify_all()

    def _remove(self, held: Held) -> None:
        del self._held[held.key]
        held.dropped = True
        if held.pins:
            self._orphans.append(held)
        else:
            self._free(held)

    def _free(self, held: Held) -> None:
        for span in held.spans():
            self.memory.free(span)
        held.images, held.parity = {}, {}
        self.changed.notify_all()

    def _remember(self, key: Key, outcome: Outcome) -> None:
        self._outcomes[key] = outcome
        self._outcomes.move_to_end(key)
        while len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)

    def _how_it_ended(self, key: Key) -> str:
        outcome = self._outcomes.get(key)
        if outcome is None:
            return ""
        if outcome.why:
            return f": {outcome.why}"
        return ": a newer one has taken its place"
