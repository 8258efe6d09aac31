"""A small file system of one's own, for tests that may mount one; others skip."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[Path]:
    """Mounts a file system in memory at a new folder.

    Args:
        place: The folder.
        options: Such as ``size=600k``.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount")
    try:
        yield place
    finally:
        # Also where something of it is still open, as what waits to be collected.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
