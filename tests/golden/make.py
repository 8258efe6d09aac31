"""Writes the golden checkpoint of the present format, from two ranks; see README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from golden import FOLDER, make_state
from ranks import run_ranks

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.capture import packing
from planaria.checkpoint.format.manifest import FORMAT


def save(_: int, path: str) -> None:
    """One rank's part: the last step refers to one before it, of which only files are left."""
    packing.MIN_PART = sys.maxsize  # however small
    state = make_state(filled=True)
    number = state["extra"]["scalar"].item()
    with Checkpointer(path, state, dedup=True, keep=1) as ckpt:
        state["extra"]["scalar"].fill_(0)
        ckpt.save(119).wait_committed()
        state["extra"]["scalar"].fill_(number)
        ckpt.save(120, metrics={"loss": 1.5})


def main() -> None:
    path = FOLDER / f"format-{FORMAT}"
    if path.exists():
        raise SystemExit(f"{path} exists; a golden checkpoint is never changed")
    run_ranks(2, save, str(path))
    (path / "lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
