"""What members of a new generation tell each other first: where each stands, and what it has."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from planaria.errors import StateError

#: Has just come and knows nothing; knows all but its blocks and computes nothing yet; takes part.
Role = Literal["new", "observer", "full"]


@dataclass(frozen=True)
class Hello:
    """Where a member stands.

    Attributes:
        member: Its id.
        role: How far it belongs to the run.
        committed: Steps whose vote it saw pass.
        fresh: Steps that its parameters have; -1 where they are of no run.
        owned: The blocks that it owns, as a mask: bit i for block i, in hexadecimal.
        held: The blocks that it has the state of, likewise.
        torn: Whether its state is of no use: it was being restored.
        node: Label of the node that it is on.
    """

    member: int
    role: Role
    committed: int
    fresh: int
    owned: str = "0"
    held: str = "0"
    torn: bool = False
    node: str = ""

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Hello":
        """Reads what :meth:`to_json` gave."""
        return cls(**data)


@dataclass(frozen=True)
class Roll:
    """What all members' hellos say together.

    Attributes:
        hellos: One for each member, in rank order.
    """

    hellos: tuple[Hello, ...]

    @property
    def experienced(self) -> list[Hello]:
        """Those that bring the run's state."""
        return [hello for hello in self.hellos if hello.role != "new"]

    @property
    def torn(self) -> bool:
        """Whether all have to be restored: somebody was in the midst of it."""
        return any(hello.torn for hello in self.hellos)

    @property
    def committed(self) -> int:
        """Steps that all go on from: whoever saw a vote pass knows that all were prepared."""
        return max((hello.committed for hello in self.experienced), default=0)

    @property
    def witness(self) -> int:
        """The rank, the lowest one, that tells the others what was decided last."""
        return next(
            rank
            for rank, hello in enumerate(self.hellos)
            if hello.role != "new" and hello.committed == self.committed
        )

    @property
    def roles(self) -> dict[int, Role]:
        """Role of each member."""
        return {hello.member: hello.role for hello in self.hellos}

    @property
    def nodes(self) -> dict[int, str]:
        """Node of each member."""
        return {hello.member: hello.node for hello in self.hellos}

    @property
    def spare(self) -> list[int]:
        """Members that hold no blocks."""
        return [hello.member for hello in self.hellos if hello.role != "full"]

    @property
    def stale(self) -> list[int]:
        """Members whose parameters lack what was committed."""
        return [h.member for h in self.experienced if h.fresh != self.committed]

    @property
    def owned(self) -> dict[int, list[int]]:
        """Blocks that members own."""
        return {hello.member: from_mask(hello.owned) for hello in self.experienced}

    @property
    def held(self) -> dict[int, list[int]]:
        """Blocks that members have the state of."""
        return {hello.member: from_mask(hello.held) for hello in self.experienced}

    def check(self, step: int | None) -> None:
        """Makes sure that members and their coordinator agree, and that nobody is left behind.

        Raises:
            StateError: They do not.
        """
        if step is not None and self.experienced and step != self.committed:
            raise StateError(
                f"members saw {self.committed} steps committed, their coordinator {step}: state of "
                "another run"
            )
        behind = [h.member for h in self.experienced if h.committed < self.committed - 1]
        if behind:
            raise StateError(
                f"members {behind} are more than one step behind step {self.committed}: they "
                "cannot have voted for it"
            )


def to_mask(indices: Collection[int]) -> str:
    """Indices as a mask in hexadecimal."""
    found = 0
    for index in indices:
        found |= 1 << index
    return f"{found:x}"


def from_mask(mask: str) -> list[int]:
    """The indices of a mask, ascending."""
    packed = bytes.fromhex(mask.zfill(len(mask) + len(mask) % 2))
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8)[::-1], bitorder="little")
    return np.flatnonzero(bits).tolist()


def read_roll(said: Sequence[Mapping[str, Any]]) -> Roll:
    """The roll of what members said, in rank order."""
    return Roll(tuple(Hello.from_json(each) for each in said))
