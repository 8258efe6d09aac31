"""Rewinding: what came later is set aside, and never comes back by itself."""

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
from planaria.errors import (
    RootError,
)

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


def test_saving_into_anothers_past_without_restoring_is_refused(tmp_path):
    save_steps(tmp_path, [10, 20])
    with Checkpointer(tmp_path, make(2), audit=True) as ckpt:
        for step in (5, 10, 20):
            with pytest.raises(RootError, match=r"holds steps up to 20.*Call restore\(\) first"):
                ckpt.save(step)
        ckpt.restore()
        ckpt.save(21).wait_committed()
        assert ckpt.all_steps() == [10, 20, 21]
