"""What the ranks of a node have under way in its snapshot process, and what their death leaves.

A rank is a session: it lasts as long as its first connection. What it had begun and not finished
goes with it; a snapshot that was described already is finished without it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from planaria.checkpoint.memory.courtesy import Words
from planaria.checkpoint.memory.memory import Key, Memory, Span


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
    """One rank.

    Attributes:
        name: How it is called in messages.
        open: Images that it may write to.
        held: How often it holds which snapshot.
        scratch: Spans that were read into for it.
        parted: Whether it said that it ends.
        watches: Whether it only looks: then it keeps nothing alive.
        slot: Its word, with which it says that it is in a collective.
    """

    name: str
    open: set[tuple[Key, str]] = field(default_factory=set)
    held: Counter[Key] = field(default_factory=Counter)
    scratch: set[Span] = field(default_factory=set)
    parted: bool = False
    watches: bool = False
    slot: int = 0


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

    def open(self, client: str, name: str, *, watches: bool = False) -> Session:
        """Begins a session, or finds the one that a further connection belongs to."""
        with self._lock:
            if watches:
                return Session(name, watches=True)
            if client not in self._sessions:
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
        for key, file in session.open:
            self._node.leave(key, file)
        for key in {key for key, _ in session.open} | undone:
            self._node.abort(key, why)
        for key in session.held.elements():
            self._node.let_go(key)
        for span in session.scratch:
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
