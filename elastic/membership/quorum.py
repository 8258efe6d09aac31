"""Which side of a job that fell apart may go on: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def has_quorum(
    present: Collection[int], members: Collection[int], dead: Collection[int] = ()
) -> bool:
    """Whether the members present may decide for the job.

    At most one of any disjoint sides may, whatever each of them knows about the dead, as long as
    those it counts as dead are.

    Args:
        present: Members that agree; others than `members` do not count.
        members: The last generation.
        dead: Members that are proven dead, not merely out of reach.
    """
    entitled = set(members) - set(dead)
    here = set(present) & entitled
    if not entitled:
        return True  # nobody is left who could decide otherwise
    if 2 * len(here) == len(entitled):
        return min(entitled) in here
    return 2 * len(here) > len(entitled)


def differences(reference: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What differs between the job's facts and a joiner's, a phrase each; empty if nothing does."""
    missing = object()
    found = []
    for name in sorted({*reference, *facts}):
        want, got = reference.get(name, missing), facts.get(name, missing)
        if want == got:
            continue
        said, wanted = ("missing" if v is missing else repr(v) for v in (got, want))
        found.append(f"{name} is {said} here and {wanted} in the job")
    return found
