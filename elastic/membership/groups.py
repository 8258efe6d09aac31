"""A generation's process groups: made without waiting for members that die meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from planaria.errors import CollectiveError

if TYPE_CHECKING:
    import torch

    from planaria.core.deadline import Deadline
    from planaria.elastic.membership.view import Membership, View
    from planaria.elastic.reduction.gloo import GlooGroup
    from planaria.elastic.reduction.nccl import NcclGroup

_LOOK_UP_S = 0.005


class Makeable(Protocol):
    """A group that can be made, and be given up by another thread meanwhile."""

    def make(self) -> Any:
        """Makes it; waits for all members."""
        ...

    def close(self) -> None:
        """Gives it up."""
        ...


G = TypeVar("G", bound=Makeable)


def make_group(membership: Membership, view: View, name: str, deadline: Deadline) -> GlooGroup:
    """Makes a gloo group of a generation's members, outside torch's registry of groups.

    Arguments, result and errors as for :func:`make_any`.
    """
    from planaria.elastic.reduction.gloo import GlooGroup

    return make_any(GlooGroup, membership, view, name, deadline)


def make_nccl_group(
    membership: Membership, view: View, name: str, deadline: Deadline, device: torch.device
) -> NcclGroup:
    """Makes an NCCL group of a generation's members, this one on `device`.

    Further arguments, result and errors as for :func:`make_any`.
    """
    from planaria.elastic.reduction.nccl import NcclGroup

    def design(store: Any, rank: int, size: int, timeout_s: float) -> NcclGroup:
        return NcclGroup(store, rank, size, timeout_s, device)

    return make_any(design, membership, view, name, deadline)


def make_any(
    design: Callable[[Any, int, int, float], G],
    membership: Membership,
    view: View,
    name: str,
    deadline: Deadline,
) -> G:
    """Makes a group of a generation's members.

    Libraries wait for each member until their timeout, and nothing can wake them. So that is done
    in a thread of its own, which is left to itself when a member is lost; what it has connected by
    then is broken.

    Args:
        design: Given a store, this rank, the size, a timeout in seconds, returns what can be made.
        membership: This process's place.
        view: The generation.
        name: Of the group; no other of the generation has it.
        deadline: In which all members have to turn up; also the group's timeout.

    Raises:
        CollectiveError: A member was lost, or others regroup.
        DeadlineError: Some member did not turn up.
    """
    making: list[G] = []
    failed: list[BaseException] = []
    done = threading.Event()
    left = threading.Event()

    def make() -> None:
        try:
            store = membership.store(view, name)
            seconds = max(deadline.remaining(), 0.001)
            making.append(design(store, view.rank, view.world_size, seconds))
            if not left.is_set():
                making[0].make()
        except BaseException as error:
            failed.append(error)
        done.set()

    def give_up() -> None:
        left.set()
        if making:
            making[0].close()

    what = f"the group of generation {view.generation}"
    threading.Thread(target=make, name=f"planaria-group-{view.generation}", daemon=True).start()
    try:
        while not done.wait(_LOOK_UP_S):
            if membership.disturbed():
                raise _regrouping(membership, what)
            deadline.check(what)
        if failed:
            if deadline.expired:
                raise deadline.error(what) from failed[0]
            raise failed[0]
        if membership.disturbed():
            # Whoever is told of losses from now on finds the group; this one came before.
            raise _regrouping(membership, what)
    except BaseException:
        give_up()
        raise
    return making[0]


def _regrouping(membership: Membership, what: str) -> CollectiveError:
    gone = ", ".join(map(str, sorted(membership.gone()))) or "none of them"
    return CollectiveError(f"no {what[4:]}: members regroup, lost: {gone}")
