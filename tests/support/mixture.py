"""A small mixture of experts of which little changes from save to save, bit for bit predictable."""

from pathlib import Path
from typing import Any

import torch
from fault_job import make_checkpointer, settle
from torch import nn

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root

#: Bytes of one expert (one chunk), of the base and of the head.
EXPERT, BASE, HEAD = 4096, 16384, 1024
ALL_NBYTES = BASE + 8 * EXPERT + HEAD
#: Bytes that every save may write whatever changed: counters and random generators.
SMALL = 6000


class Mixture(nn.Module):
    """A base that is frozen at most times, experts in one fused tensor, and a head."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(64, 64, generator=generator), requires_grad=False)
        self.experts = nn.Parameter(torch.randn(8, 32, 32, generator=generator))
        self.head = nn.Parameter(torch.randn(16, 16, generator=generator))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))

    @property
    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self}

    def touch(self, *experts: int, base: float = 0.0) -> None:
        """Changes the head, and these experts."""
        with torch.no_grad():
            self.head += 1
            self.count += 1
            for expert in experts:
                self.experts[expert] += 1
            if base:
                self.base += base

    def copy(self) -> dict[str, torch.Tensor]:
        """All values, by name."""
        return {name: value.clone() for name, value in self.state_dict().items()}


def begin(path: "Path | str | LocalStorage", model: Mixture, **options: Any) -> Checkpointer:
    """A checkpointer that refers to what has not changed."""
    return make_checkpointer(path, model, **{"dedup": True, **options})  # pyright: ignore[reportArgumentType]


def save(ckpt: Checkpointer, model: Mixture, step: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Saves and waits until old steps are gone; how much was written, and what was saved."""
    handle = ckpt.save(step)
    handle.wait_committed()
    settle(ckpt)
    return handle.nbytes, model.copy()


def check_stored(path: Path, saved: dict[int, dict[str, torch.Tensor]]) -> None:
    """These steps verify, and hold exactly what was saved."""
    for step, expected in saved.items():
        stored = open_checkpoint(path, step)
        assert stored.verify() == [], step
        for name, value in expected.items():
            found = stored.read(f"model.{name}")
            assert torch.equal(found, value), f"{name} of step {step}"


def states(path: "Path | str") -> dict[int, str]:
    """Step -> the state of its folder."""
    return {f.step: f.state for f in Root(LocalStorage(path)).folders()}


def orphans(path: Path) -> list[str]:
    """Data files that no manifest mentions, and scratch files."""
    manifests = "".join(p.read_text() for p in path.glob("step-*/manifest.json"))
    found = [p for p in path.rglob("*") if p.is_file()]
    unknown = [p for p in found if p.suffix == ".safetensors" and p.name not in manifests]
    return [str(p) for p in (*unknown, *(p for p in found if ".tmp-" in p.name))]
