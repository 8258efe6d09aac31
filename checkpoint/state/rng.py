"""The random number generators of a rank: python, numpy, torch, and every CUDA device's."""

import hashlib
import random
from functools import partial
from typing import Any

import numpy as np
import torch

from planaria.checkpoint.state import tree
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.objects import Late
from planaria.checkpoint.state.provider import LoadPlan
from planaria.errors import CorruptError


class RngProvider:
    """Generator states, one set a rank.

    A rank that the checkpoint does not know (a larger world) gets streams of its own, derived from
    the saved ones and its number; the report says so.
    """

    def __init__(self, key: str = "rng") -> None:
        self.key = key

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():  # to ask whether there are any takes longer
            state["cuda"] = torch.cuda.get_rng_state_all()
        out.object(self.key, Late(partial(tree.encode, state, self.key)))

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`."""
        states = plan.objects_of_all_ranks(self.key)
        if not states:
            return
        stored = plan.manifest.objects[self.key]
        mine = stored.get("all") or stored["ranks"].get(str(plan.rank))
        known = plan.rank < plan.manifest.world_size
        if mine is not None and known:
            state = tree.decode(mine)
            _try_out(state)
            if "cuda" in state and not torch.cuda.is_available():
                plan.skipped[f"{self.key}.cuda"] = "there is no CUDA device here"
            plan.then(lambda: _set(state))
            return
        plan.skipped[self.key] = (
            f"saved by {plan.manifest.world_size} ranks: rank {plan.rank} starts new streams, "
            "derived from the saved ones"
        )
        digest = hashlib.sha256(repr((states[0], plan.rank)).encode()).digest()
        plan.then(lambda: _seed(int.from_bytes(digest[:4], "little")))


def _try_out(state: dict[str, Any]) -> None:
    """Finds out whether generators take these states, on ones that nobody uses."""
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["torch"])
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CorruptError(
            f"the stored states of the random number generators make no sense ({error!r})"
        ) from error


def _set(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for device, stored in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(stored, device)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
