"""What a snapshot process has to say."""

from __future__ import annotations

import contextlib


def say(text: str) -> None:
    """Writes a line to the process's log; that its disk is full holds up nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)
