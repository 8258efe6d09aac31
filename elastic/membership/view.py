"""What a member of a job sees of the others, and what it can ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from planaria.core.deadline import Deadline
from planaria.errors import WireError

if TYPE_CHECKING:
    from torch.distributed import Store

#: What :meth:`Membership.progress` takes. In WAITING a member waits for others, it is not to blame.
PHASES = ("data", "compute", "reduce", "vote", "apply", "idle")
WAITING = frozenset(("reduce", "vote"))
#: Not a part of a step: evaluation, saving, what the user does in between.
IDLE = "idle"


@dataclass(frozen=True)
class View:
    """One generation of a job, seen by one of its members.

    Attributes:
        generation: Number of the generation, from 1.
        members: Ids in ascending order. An id is for life and never given again; a member's rank
            is its place in here.
        me: The id of the one who looks.
        joined: Members that bring no state. None where nobody brings any, see `step`.
        lost: Members of the generation before that are gone.
        step: Steps committed, from which all go on. None where nobody brings state: in generation
            1, and where all of a generation were lost and replaced.
        store: Host and port of the store of this generation.
        last: Why the job cannot go on, where this generation is there to save alone: no step
            follows, its members :meth:`Membership.finish`. Empty for any other.
    """

    generation: int
    members: tuple[int, ...]
    me: int
    joined: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    step: int | None = None
    store: tuple[str, int] = ("", 0)
    last: str = ""

    @property
    def rank(self) -> int:
        """This member's place among the members."""
        return self.members.index(self.me)

    @property
    def world_size(self) -> int:
        """Number of members."""
        return len(self.members)

    def seen_by(self, member: int) -> View:
        """The same generation for another member."""
        return replace(self, me=member)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> View:
        """Reads a view.

        Raises:
            WireError: It is malformed.
        """
        try:
            step, (host, port) = record["step"], record["store"]
            return View(
                generation=int(record["generation"]),
                members=ids(record["members"]),
                me=int(record["me"]),
                joined=ids(record["joined"]),
                lost=ids(record["lost"]),
                step=None if step is None else int(step),
                store=(str(host), int(port)),
                last=str(record["last"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"a malformed view: {error!r}") from None


@dataclass(frozen=True)
class Standing:
    """What a member says when it regroups, its groups destroyed.

    Attributes:
        generation: The generation that it was in.
        committed: Steps whose vote it saw pass, as far as it knows, applied or not.
        reason: Why it regroups, for people.
        suspects: Members that it waited for in vain.
        leaving: It will not be a member any more; only :meth:`Membership.leave` says so.
    """

    generation: int
    committed: int
    reason: str = ""
    suspects: tuple[int, ...] = ()
    leaving: bool = False

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Standing:
        """Reads a standing.

        Raises:
            WireError: It is malformed.
        """
        try:
            return Standing(
                generation=int(record["generation"]),
                committed=int(record["committed"]),
                reason=str(record["reason"]),
                suspects=ids(record["suspects"]),
                leaving=bool(record["leaving"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"a malformed standing: {error!r}") from None


class Membership(Protocol):
    """A member's place in a job.

    One thread uses it, but for `gone`, `change_wanted` and `progress`, which any may call.
    """

    id: int

    def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
        """Asks to take part; returns once admitted, at a step boundary of the others.

        Args:
            facts: What has to be equal on all members, by name, of what JSON holds: the code's
                hash, the configuration, versions, threads.
            deadline: When to give up.

        Raises:
            ConfigError: The facts differ from the others'; it lists the differences.
            StoppedError: The job is over.
            DeadlineError: It was not admitted in time.
        """
        ...

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        """Agrees with the other survivors on the next generation.

        Destroy all groups of the old one before: that is what wakes others who hang in them.

        Args:
            standing: Where this member stands.
            deadline: When to give up. The coordinator has a budget of its own.

        Returns:
            The next generation. Its `step` is the newest that any survivor saw committed. Where
            too few members are left to go on it is the job's last one, see `View.last`: connect,
            save, and :meth:`finish`.

        Raises:
            StoppedError: The job cannot go on: no quorum, this member left out, nobody to save.
            CollectiveError: The job cannot regroup: it has no agent, or the agent is gone.
            DeadlineError: There was no agreement in time.
        """
        ...

    def store(self, view: View, name: str = "") -> Store:
        """A store that the generation's members share under a name.

        Raises:
            CollectiveError: The store does not answer.
        """
        ...

    def change_wanted(self) -> str | None:
        """What is wanted at the next step boundary: "join", "leave", "stop" or nothing.

        "join": others wait to be admitted, so all regroup. "leave": this member is to
        :meth:`leave`. "stop": the whole job is to save and end. All of it is known to this member
        alone until it tells the others.
        """
        ...

    def gone(self) -> frozenset[int]:
        """Members of the current generation that are proven dead."""
        ...

    def disturbed(self) -> bool:
        """Whether members were lost or others regroup: the generation's groups are of no use."""
        ...

    def on_loss(self, call: Callable[[frozenset[int]], object]) -> None:
        """Has `call(ids)` called in the control thread as soon as members are lost.

        Also with no ids, when another member regroups for a reason of its own.
        """
        ...

    def progress(self, step: int, phase: str) -> None:
        """Says what this member is doing; costs next to nothing.

        Args:
            step: The step's number.
            phase: One of `PHASES`.
        """
        ...

    def leave(self, reason: str, deadline: Deadline) -> None:
        """Goes, after what others need of this member was handed over, at a step boundary.

        The others have to :meth:`regroup`.
        """
        ...

    def finish(self, deadline: Deadline, *, complete: bool = False) -> None:
        """Says that the run is done: from now on this member's end is no loss.

        Args:
            deadline: When to give up.
            complete: Whether there is nothing left to do, even in a last generation: then the job
                has come to its end there, and was not stopped.
        """
        ...

    def close(self) -> None:
        """Hangs up. It may be called again."""
        ...


def ids(values: Any) -> tuple[int, ...]:
    """Reads member ids.

    Raises:
        TypeError: They are not a list of integers.
    """
    found = tuple(values)
    if not all(type(each) is int for each in found):
        raise TypeError(f"not member ids: {found!r}")
    return found
