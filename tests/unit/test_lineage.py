"""What a folder remembers of its mirror, changed by two threads at once."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import WAIT_S, must_notice, save_once
from save_cases import start

from planaria.checkpoint import open_checkpoint
from planaria.checkpoint.storage import lineage
from planaria.checkpoint.storage.lineage import LineageFile
from planaria.checkpoint.storage.local import LocalStorage


class SlowToWrite(LocalStorage):
    """Tells when the next file is about to be written, and waits."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def put(self, *args: Any, **kwargs: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(WAIT_S)
        super().put(*args, **kwargs)


def check_a_rewind_is_not_noted_again(root: Path, wait_s: float) -> None:
    """The writing thread settles it while the mirror's has set its steps aside already."""
    save_once(root, start(), 3)
    attempt = open_checkpoint(root).manifest.attempt
    writers, mirrors = SlowToWrite(root), LocalStorage(root)
    LineageFile(mirrors).rewind(2, step=3, attempt=attempt)
    settling = threading.Thread(target=LineageFile(writers).settle)
    settling.start()
    assert writers.reached.wait(WAIT_S)
    setting_aside = threading.Thread(target=LineageFile(mirrors).set_aside, args=(2,))
    setting_aside.start()
    setting_aside.join(wait_s)
    writers.go_on.set()
    for thread in (settling, setting_aside):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert LineageFile(mirrors).read().rewound_to is None


def test_a_rewind_that_was_set_aside_is_not_noted_again(tmp_path: Path) -> None:
    check_a_rewind_is_not_noted_again(tmp_path, 0.1)


def test_sabotage_threads_change_the_lineage_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "_changing", contextlib.nullcontext())
    must_notice(check_a_rewind_is_not_noted_again, tmp_path, WAIT_S)
