"""What a failed save does, under each failure policy."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    faulty_storage,
)
from save_cases import everything, start, train_step

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.core import points
from planaria.errors import (
    ConfigError,
    SaveFailedError,
)


def failing(path: Path, times: float) -> Any:
    """A folder in which the first writes to data files fail."""
    count = itertools.count()

    def before(call: str, data: Any) -> None:
        if call == "write" and len(data) >= 4096 and next(count) < times:
            raise OSError(28, "No space left on device")

    return faulty_storage(path, before)


@pytest.fixture
def _no_pauses(monkeypatch):
    monkeypatch.setattr("planaria.checkpoint.persist.RETRY_AFTER_S", (0.0, 0.0, 0.0))


def test_fatal_raises_at_the_next_call(tmp_path):
    with Checkpointer(failing(tmp_path, 1), start(), audit=True, on_failure="fatal") as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(SaveFailedError, match="No space left on device"):
            handle.wait_committed()
        assert isinstance(handle.error, SaveFailedError)
        with pytest.raises(SaveFailedError, match=r"step 1 was not committed.*No space left"):
            ckpt.step(2)
        ckpt.step(2)  # told once
        ckpt.save(3).wait_committed()
        assert ckpt.all_steps() == [3]


@pytest.mark.usefixtures("_no_pauses")
def test_retry_writes_again_and_the_checkpoint_is_whole(tmp_path):
    state = start()
    with Checkpointer(failing(tmp_path, 3), state, audit=True, on_failure="retry") as ckpt:
        expected = everything(state)
        ckpt.save(1).wait_committed()
    assert open_checkpoint(tmp_path).verify() == []
    assert everything(state) == expected


@pytest.mark.usefixtures("_no_pauses")
def test_retry_gives_up_in_the_end(tmp_path):
    with Checkpointer(failing(tmp_path, 4), start(), audit=True, on_failure="retry") as ckpt:
        with pytest.raises(SaveFailedError, match="No space left"):
            ckpt.save(1).wait_committed()
        with pytest.raises(SaveFailedError, match="No space left"):
            ckpt.save(2)


@pytest.mark.usefixtures("_no_pauses")
def test_degrade_warns_and_training_goes_on(tmp_path):
    state = start()
    with Checkpointer(failing(tmp_path, 4), state, audit=True, on_failure="degrade") as ckpt:
        with pytest.warns(UserWarning, match="No space left.*training goes on without it"):
            ckpt.save(1)._done.wait(60)
        train_step(state)
        assert ckpt.step(2) is None
        ckpt.save(3).wait_committed()
        assert ckpt.all_steps() == [3]


@pytest.mark.usefixtures("_no_pauses")
def test_degrade_where_warnings_are_errors_still_tells(tmp_path):
    with (
        warnings.catch_warnings(),
        Checkpointer(failing(tmp_path, 4), start(), audit=True, on_failure="degrade") as ckpt,
    ):
        warnings.simplefilter("error")
        ckpt.save(1)._done.wait(60)
        with pytest.raises(SaveFailedError, match="No space left"):
            ckpt.step(2)
        ckpt.save(3).wait_committed()


@pytest.mark.usefixtures("_no_pauses")
@pytest.mark.parametrize("policy", ["fatal", "retry"])
def test_a_failure_surfaces_when_closing(policy, tmp_path):
    ckpt = Checkpointer(failing(tmp_path, 9), start(), audit=True, on_failure=policy)
    ckpt.save(1)
    ckpt.save(2)
    with pytest.raises(SaveFailedError, match=r"step 1.*No space left") as caught:
        ckpt.close()
    assert any("step 2" in note for note in caught.value.__notes__) or policy == "fatal"
    ckpt.close()


def save_and_fail(path: Any) -> None:
    with Checkpointer(path, start(), audit=True, on_failure="fatal") as ckpt:
        ckpt.save(1)
        raise KeyError("the cause")


def test_a_failure_does_not_hide_the_error_that_ends_a_run(tmp_path):
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(KeyError, match="cause"):
        save_and_fail(failing(tmp_path, 1))


def test_leaving_by_an_exception_finishes_the_save_under_way(tmp_path):
    with pytest.raises(KeyError, match="the cause"):
        save_and_fail(tmp_path)
    assert open_checkpoint(tmp_path).verify() == []


@pytest.mark.parametrize("policy", ["fatal", "retry", "degrade"])
@pytest.mark.parametrize("point", ["checkpoint.call", "checkpoint.plan", "checkpoint.capture.end"])
def test_a_failure_at_any_stage_frees_the_gate_and_commits_nothing(point, policy, tmp_path):
    state = start()
    with Checkpointer(tmp_path, state, audit=True, on_failure=policy) as ckpt:
        with warnings.catch_warnings(), points.armed(f"raise=on purpose@{point}"):
            warnings.simplefilter("ignore")
            handle = ckpt.save(1)
            with pytest.raises(SaveFailedError, match="on purpose"):
                handle.wait_committed()
        train_step(state)
        if policy != "degrade":
            with pytest.raises(SaveFailedError, match="on purpose"):
                ckpt.step(2)
        ckpt.save(3).wait_committed()
        assert ckpt.all_steps() == [3]


def test_a_policy_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'fatal', 'retry' or 'degrade'"):
        Checkpointer(tmp_path, start(), on_failure="ignore")  # type: ignore[arg-type]
