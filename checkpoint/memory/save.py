"""One snapshot in memory on its way, as a rank sees it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.memory import Key


@dataclass
class MemorySave:
    """One snapshot, on this rank.

    Attributes:
        handle: What the caller holds of it.
        error: Why there will be none.
        key: Which one, once its memory was found.
        image: Its memory.
        file: Name of the image.
        header_nbytes: Length of the image's header.
        sums: Checksums of what was captured.
        captured: Set once nothing is written to the image any more.
        client: The node that has the image.
        by_nodes: Whether the nodes are to write the step to storage.
        persist: Root that rank 0 tells them, if so.
        described: Whether the nodes have been told all, and finish it by themselves.
    """

    handle: SaveHandle
    error: Exception | None = None
    key: Key | None = None
    image: NDArray[np.uint8] | None = None
    file: str = ""
    header_nbytes: int = 0
    sums: list[int] = field(default_factory=list)
    captured: threading.Event = field(default_factory=threading.Event)
    client: NodeClient | None = None
    by_nodes: bool = False
    persist: str | None = None
    described: bool = False

    def fail(self, error: Exception) -> None:
        """Notes the first thing that went wrong."""
        self.error = self.error or error
