"""One save on its way through the pipeline."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.packing import Packer
from planaria.checkpoint.capture.pool import Buffers
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.layout.own_plan import OwnPlan
from planaria.checkpoint.memory.save import MemorySave
from planaria.checkpoint.persist import CapturedChunks
from planaria.checkpoint.run_info import run_info
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.objects import settled
from planaria.checkpoint.state.recall import Recalled
from planaria.checkpoint.unchanged import Base


@dataclass
class SaveJob:
    """One save on its way through the pipeline.

    Attributes:
        handle: What the caller holds.
        entries: Tensors of this rank by name; those that are not lazy are copies already.
        objects: Small objects, as JSON data, or `Late` until it was settled.
        audit: Remembers what the lazy tensors looked like; None if the call failed.
        ready: For each CUDA device, an event after which its memory may be read.
        metrics: The caller's metrics.
        threads: How many threads the training thread computes with.
        run: Description of the run, for the manifest; once it was settled.
        error: First thing that went wrong on this rank.
        agreed: Whether every rank knows of the failure already.
        attempt: Id of this save, which its files carry in their names.
        own: What this rank writes, once ranks have agreed.
        packer: Captures what has changed since the step that the save may refer to.
        base: That step, held by rank 0.
        durable: Whether it goes to storage.
        memory: The same step in memory, if that is due.
        buffers: What is captured into.
        chunks: What is captured and not yet written.
        planned: Set once ranks have agreed, or failed to.
    """

    handle: SaveHandle
    entries: Mapping[str, TensorEntry]
    objects: dict[str, Any]
    audit: Audit | None
    ready: dict[torch.device, torch.Event]
    metrics: dict[str, Any]
    threads: int
    run: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    agreed: bool = False
    attempt: str = ""
    own: OwnPlan | None = None
    packer: Packer | None = None
    base: Base | None = None
    durable: bool = True
    memory: MemorySave | None = None
    buffers: Buffers | None = None
    chunks: CapturedChunks = field(default_factory=CapturedChunks)
    planned: threading.Event = field(default_factory=threading.Event)

    @property
    def step(self) -> int:
        return self.handle.step

    def let_go(self) -> None:
        """Once it is captured, or will not be: the state may change, nothing looks at it again."""
        if isinstance(self.entries, Recalled):
            self.entries.let_go()
        self.entries, self.audit = {}, None

    def settle(self) -> None:
        """In the background, before anybody is told of it: does what the call had no time for."""
        try:
            self.objects = settled(self.objects)
            self.run = run_info(self.threads)
        except Exception as error:
            self.error, self.objects = self.error or error, {}
