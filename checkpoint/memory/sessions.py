"""What the ranks of a node have under way in its snapshot process, and what their death leaves.

A rank is a session: it lasts as long as its first connection. What it had begun and not finished
goes with it; a snapshot that was described already is finished without it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from planaria.checkpoint.memory.courtesy import Words
from planaria.checkpoint.memory.memory import Key, Memory, Span
from planaria.errors import WireError

T = TypeVar("T")


class Holder(Protocol):
    """What sessions need of a node; `planaria.checkpoint.memory.node` has it."""

    def leave(self, key: Key, file: str) -> None:
        """The rank of this image will not write to it any more."""
        ...

    def abort(self, key: Key, why: str) -> None:
        """Forgets the attempt on all nodes, unless it was described."""
        ...

    def let_go(self, key: Key) -> None:
        """Ends one `hold`."""
        ...


@dataclass
class Session:
    """One rank. What it was given is noted by `given`, and what it gives back by `taken`.

    Attributes:
        name: How it is called in messages.
        open: Images that it may write to.
        held: How often it holds which snapshot.
        scratch: Spans that were read into for it.
        over: Whether it is gone: what it asked for, and gets only now, nobody would give back.
        parted: Whether it said that it ends.
        watches: Whether it only looks: then it keeps nothing alive.
        slot: Its word, with which it says that it is in a collective.
    """

    name: str
    open: Counter[tuple[Key, str]] = field(default_factory=Counter)
    held: Counter[Key] = field(default_factory=Counter)
    scratch: Counter[Span] = field(default_factory=Counter)
    parted: bool = False
    watches: bool = False
    slot: int = 0
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def given(self, things: Counter[T], thing: T) -> bool:
        """Notes that it has something; False if it is gone."""
        with self.lock:
            if not self.over:
                things[thing] += 1
            return not self.over

    def taken(self, things: Counter[T], thing: T) -> bool:
        """Notes that it gives something back; False if it does not have it."""
        with self.lock:
            has = things[thing] > 0
            things[thing] -= has
            return has

    def end(self) -> tuple[list[tuple[Key, str]], list[Key], list[Span]]:
        """It is gone; returns what it had open, held and read into."""
        with self.lock:
            self.over = True
            began, held = list(self.open.elements()), list(self.held.elements())
            scratch = list(self.scratch.elements())
            for each in (self.open, self.held, self.scratch):
                each.clear()
            return began, held, scratch


class Sessions:
    """All sessions of a node.

    Args:
        node: Is told what a rank leaves behind.
        memory: Gets scratch memory back.
        words: Of the ranks: that of one that is gone is taken back.
    """

    def __init__(self, node: Holder, memory: Memory, words: Words) -> None:
        self._node, self._memory, self._words = node, memory, words
        self._opened = 0
        self._sessions: dict[str, Session] = {}
        self._sealed: set[Key] = set()  # not described yet, as far as this node was asked
        self._lock = threading.Lock()
        self._alone_since = time.monotonic()
        self.done = threading.Event()  # the job has ended

    def open(self, client: str, name: str, *, main: bool, watches: bool = False) -> Session:
        """Begins a session with its first connection, finds it for a further one.

        Raises:
            WireError: The session is over: a further connection came late.
        """
        with self._lock:
            if watches:
                return Session(name, watches=True)
            if client not in self._sessions:
                if not main:
                    raise WireError(f"the session of {name} is over")
                self._opened += 1
                self._sessions[client] = Session(name, slot=self._opened)
            return self._sessions[client]

    def close(self, client: str) -> None:
        """Ends a session; what it left behind is cleared up."""
        with self._lock:
            session = self._sessions.pop(client, None)
            if session is None:
                return
            undone = set() if self._sessions else set(self._sealed)
            if not self._sessions:
                self._sealed.clear()
                self._alone_since = time.monotonic()
            last = not self._sessions
        self._words.end(session.slot)
        why = f"{session.name} {'ended' if session.parted else 'is gone'}"
        began, held, scratch = session.end()
        for key, file in began:
            self._node.leave(key, file)
        for key in {key for key, _ in began} | undone:
            self._node.abort(key, why)
        for key in held:
            self._node.let_go(key)
        for span in scratch:
            self._memory.free(span)
        # Ranks part together, and a launcher last: who parts last speaks for the job.
        if last and session.parted:
            self.done.set()

    def sealed(self, key: Key) -> None:
        """An image of a snapshot is complete."""
        with self._lock:
            self._sealed.add(key)

    def settled(self, key: Key) -> None:
        """A snapshot was described, or given up: ranks are not needed for it any more."""
        with self._lock:
            self._sealed.discard(key)

    @property
    def names(self) -> list[str]:
        """Who is connected."""
        with self._lock:
            return [session.name for session in self._sessions.values()]

    @property
    def alone_s(self) -> float:
        """Seconds since there was a rank; 0 while there is one."""
        with self._lock:
            return 0.0 if self._sessions else time.monotonic() - self._alone_since
