"""Small objects of all ranks: what may be one, and how they are put together."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planaria.errors import StateError


@dataclass(frozen=True)
class Late:
    """An object that was taken at the call and is turned to JSON data in the background.

    Attributes:
        make: Makes it of what was taken: the same whenever it is called.
    """

    make: Callable[[], Any]


def settled(objects: dict[str, Any]) -> dict[str, Any]:
    """The same objects, all of them JSON data."""
    return {n: v.make() if isinstance(v, Late) else v for n, v in objects.items()}


def check_objects(objects: dict[str, Any]) -> None:
    """Makes sure that objects can be sent and stored; a provider may hand out anything.

    Raises:
        StateError: One is not JSON data; names it.
    """
    for name, value in objects.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StateError(f"object {name!r} is not JSON data: {error}") from error


def merge_objects(of_rank: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One value where all ranks that have an object agree, one for each rank where not."""
    merged: dict[str, dict[str, Any]] = {}
    for rank, objects in enumerate(of_rank):
        for name, value in objects.items():
            merged.setdefault(name, {"ranks": {}})["ranks"][str(rank)] = value
    for name, stored in merged.items():
        values = list(stored["ranks"].values())
        if all(v == values[0] for v in values):
            merged[name] = {"all": values[0]}
    return merged
