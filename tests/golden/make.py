"""Writes the golden checkpoint of the present format, from two ranks; see README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from golden import FOLDER, make_state
from ranks import run_ranks

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.format.manifest import FORMAT


def save(_: int, path: str) -> None:
    """One rank's part."""
    with Checkpointer(path, make_state(filled=True)) as ckpt:
        ckpt.save(120, metrics={"loss": 1.5})


def main() -> None:
    path = FOLDER / f"format-{FORMAT}"
    if path.exists():
        raise SystemExit(f"{path} exists; a golden checkpoint is never changed")
    run_ranks(2, save, str(path))
    (path / "lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
