"""Rewinding: what came later is set aside, and never comes back by itself."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import (
    contents,
    held,
    in_background,
    load_once,
    randomise,
)
from restore_cases import damage, make, save_steps

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.reader import open_root
from planaria.checkpoint.storage.local import LocalStorage
from planaria.errors import RootError, SaveFailedError

# Falling back is told by a warning, too, which one test looks at.
pytestmark = pytest.mark.filterwarnings("ignore:step .* cannot be restored")


def states(path: Path) -> dict[int, str]:
    return {f.step: f.state for f in open_root(path).folders()}


def test_rewinding_sets_the_later_steps_aside(tmp_path):
    saved = save_steps(tmp_path, [10, 20, 30])
    state = make(2)
    with Checkpointer(tmp_path, state, audit=True, every=10) as ckpt:
        report = ckpt.restore(step=10)
        assert report is not None
        assert report.step == 10
        assert {k: contents(v) for k, v in state.items()} == saved[10]
        assert states(tmp_path) == {10: "committed", 20: "committed", 30: "committed"}
        randomise(state["model"], 77)
        handle = ckpt.step(20)
        assert handle is not None, "the same number, but another past"
        handle.wait_committed()
        assert states(tmp_path) == {10: "committed", 20: "committed", 30: "abandoned"}
        assert ckpt.all_steps() == [10, 20]
        assert ckpt.latest_step() == 20
    expected = contents(state["model"])
    fresh = make(3)
    assert load_once(tmp_path, fresh).step == 20
    assert contents(fresh["model"]) == expected
    # Written again, the number belongs to the new past.
    with Checkpointer(tmp_path, fresh, audit=True) as ckpt:
        ckpt.restore()
        ckpt.save(30).wait_committed()
    assert states(tmp_path) == {10: "committed", 20: "committed", 30: "committed"}
    assert load_once(tmp_path, make(4)).step == 30


def test_rewinding_in_one_run_saves_the_same_numbers_again(tmp_path):
    state = make(1)
    with Checkpointer(tmp_path, state, audit=True, every=10) as ckpt:
        for step in (10, 20):
            assert ckpt.step(step) is not None
        ckpt.restore(step=10)
        randomise(state["model"], 5)
        assert ckpt.step(20) is not None
    expected = contents(state["model"])
    load_once(tmp_path, state)
    assert contents(state["model"]) == expected


def test_a_save_under_way_never_lands_after_a_rewind(tmp_path):
    """The save of step 30 is still being written when the run goes back to 10."""
    state = make(1)
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        ckpt.save(10).wait_committed()
        with held("checkpoint.write.end") as hold:
            ckpt.save(30)
            hold.wait_reached()
            thread, done = in_background(lambda: ckpt.restore(step=10))
            assert not done.wait(0.2)
            hold.go_on.set()
            thread.join()
        ckpt.save(20).wait_committed()
        assert ckpt.latest_step() == 20
    assert states(tmp_path) == {10: "committed", 20: "committed", 30: "abandoned"}


def test_a_rewind_that_saves_nothing_changes_nothing(tmp_path):
    save_steps(tmp_path, [10, 20])
    load_once(tmp_path, make(2), step=10)
    assert load_once(tmp_path, make(2)).step == 20


def test_falling_back_sets_the_damaged_step_aside(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    damage(tmp_path, 30, "manifest")
    damage(tmp_path, 20, "data")
    with Checkpointer(tmp_path, make(2), audit=True) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert report.step == 10
        ckpt.save(15).wait_committed()
    assert states(tmp_path) == {
        10: "committed",
        15: "committed",
        20: "abandoned",
        30: "abandoned",
    }
    assert load_once(tmp_path, make(2)).step == 15


class Failing(LocalStorage):
    """A disk that is full for what `refused` picks out, by path and data."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused: Callable[[str, bytes], bool] = lambda path, data: False

    def put(self, path, data, *, points=None, step=None):
        if self.refused(path, data):
            raise OSError(errno.ENOSPC, "no space")
        super().put(path, data, points=points, step=step)


def marks(path: Path, step: int) -> list[bytes]:
    return [p.read_bytes() for p in (path / f"step-{step:08d}").glob("abandoned-*")]


def test_a_save_that_fails_sets_nothing_aside(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    storage = Failing(tmp_path)
    with Checkpointer(storage, make(2), audit=True, on_failure="fatal") as ckpt:
        ckpt.restore(step=10)
        storage.refused = lambda path, data: path.endswith("manifest.json")
        with pytest.raises(SaveFailedError, match="no space"):
            ckpt.save(15).wait_committed()
        assert ckpt.all_steps() == [10, 20, 30]
        with pytest.raises(SaveFailedError, match="no space"):
            ckpt.step(15)
    assert load_once(tmp_path, make(3)).step == 30
    # The attempt has left marks, which another run clears away with its first commit.
    assert len(marks(tmp_path, 20)) == 1
    with Checkpointer(tmp_path, make(3), audit=True) as ckpt:
        ckpt.restore()
        ckpt.save(40).wait_committed()
        assert ckpt.all_steps() == [10, 20, 30, 40]
    assert marks(tmp_path, 20) == marks(tmp_path, 30) == []


def test_the_save_after_one_that_failed_sets_the_later_steps_aside(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    storage = Failing(tmp_path)
    with Checkpointer(storage, make(2), audit=True, on_failure="fatal") as ckpt:
        ckpt.restore(step=10)
        storage.refused = lambda path, data: path.endswith("manifest.json")
        with pytest.raises(SaveFailedError, match="no space"):
            ckpt.save(15).wait_committed()
        storage.refused = lambda path, data: False
        with pytest.raises(SaveFailedError, match="no space"):
            ckpt.step(15)
        ckpt.save(16).wait_committed()
        assert ckpt.all_steps() == [10, 16]
    assert marks(tmp_path, 20) == marks(tmp_path, 30) == [b""]


def test_what_was_set_aside_stays_so_when_the_step_that_did_it_goes(tmp_path):
    """The run dies right after the commit; what it left open is ended by the next one."""
    save_steps(tmp_path, [10, 20, 30])
    storage = Failing(tmp_path)
    storage.refused = lambda path, data: "abandoned-" in path and not data
    with Checkpointer(storage, make(2), audit=True) as ckpt:
        ckpt.restore(step=10)
        ckpt.save(15).wait_committed()
    assert states(tmp_path) == {
        10: "committed",
        15: "committed",
        20: "abandoned",
        30: "abandoned",
    }
    assert len(marks(tmp_path, 30)[0]) > 0
    with Checkpointer(tmp_path, make(3), audit=True, keep=1) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert report.step == 15
        ckpt.save(16).wait_committed()
    assert states(tmp_path) == {16: "committed", 30: "abandoned"}
    assert marks(tmp_path, 30) == [b""]
    assert load_once(tmp_path, make(4)).step == 16


def test_the_step_that_set_others_aside_may_be_written_again(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    storage = Failing(tmp_path)
    storage.refused = lambda path, data: "abandoned-" in path and not data
    with Checkpointer(storage, make(2), audit=True) as ckpt:
        ckpt.restore(step=10)
        ckpt.save(15).wait_committed()
    with Checkpointer(tmp_path, make(3), audit=True) as ckpt:
        ckpt.restore(step=10)
        ckpt.save(15).wait_committed()
        assert ckpt.all_steps() == [10, 15]


def test_a_step_that_was_unreadable_for_a_moment_does_not_come_back(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    manifest = tmp_path / "step-00000030" / "manifest.json"
    whole = manifest.read_bytes()
    damage(tmp_path, 30, "manifest")
    with Checkpointer(tmp_path, make(2), audit=True) as ckpt:
        ckpt.restore()
        manifest.write_bytes(whole)
        assert ckpt.all_steps() == [10, 20, 30], "nothing was set aside so far"
        damage(tmp_path, 30, "manifest")
        ckpt.save(25).wait_committed()
    manifest.write_bytes(whole)
    assert states(tmp_path)[30] == "abandoned"
    assert load_once(tmp_path, make(3)).step == 25


def test_rewinding_over_and_over_does_not_fill_the_disk(tmp_path):
    state = make(1)
    with Checkpointer(tmp_path, state, audit=True, keep=2) as ckpt:
        ckpt.save(10).wait_committed()
        for n in range(5):
            ckpt.save(20 + n).wait_committed()
            ckpt.restore(step=10)
        ckpt.save(15).wait_committed()
    assert states(tmp_path) == {
        10: "committed",
        15: "committed",
        23: "abandoned",
        24: "abandoned",
    }
    assert load_once(tmp_path, make(2)).step == 15


def test_saving_into_anothers_past_without_restoring_is_refused(tmp_path):
    save_steps(tmp_path, [10, 20])
    with Checkpointer(tmp_path, make(2), audit=True) as ckpt:
        for step in (5, 10, 20):
            with pytest.raises(RootError, match=r"holds steps up to 20.*Call restore\(\) first"):
                ckpt.save(step)
        ckpt.restore()
        ckpt.save(21).wait_committed()
        assert ckpt.all_steps() == [10, 20, 21]
