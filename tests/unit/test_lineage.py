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
    unlocked = {LocalStorage(tmp_path).url: contextlib.nullcontext()}
    monkeypatch.setattr(lineage, "_changing", unlocked)
    must_notice(check_a_rewind_is_not_noted_again, tmp_path, WAIT_S)


def check_other_folders_go_on(tmp_path: Path, wait_s: float) -> None:
    """Where one folder's storage hangs, a run in another does not notice."""
    hangs = SlowToWrite(tmp_path / "hangs")
    hung = threading.Thread(target=LineageFile(hangs).adopt, args=("a",))
    hung.start()
    assert hangs.reached.wait(WAIT_S)
    other = LineageFile(LocalStorage(tmp_path / "other"))
    going_on = threading.Thread(target=other.adopt, args=("b",))
    going_on.start()
    going_on.join(wait_s)
    went_on = not going_on.is_alive()
    hangs.go_on.set()
    for thread in (hung, going_on):
        thread.join(WAIT_S)
    assert went_on


def test_a_folder_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    for name in ("hangs", "other"):
        (tmp_path / name).mkdir()
    check_other_folders_go_on(tmp_path, WAIT_S)


def test_sabotage_one_lock_for_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hangs", "other"):
        (tmp_path / name).mkdir()
    one = threading.Lock()
    both = {LocalStorage(tmp_path / name).url: one for name in ("hangs", "other")}
    monkeypatch.setattr(lineage, "_changing", both)
    must_notice(check_other_folders_go_on, tmp_path, 0.1)
