"""Saving: what waits for what, what a failure does, what is kept."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checkpoints import (
    contents,
    data_files,
    held,
    in_background,
    load_once,
    must_notice,
)
from save_cases import everything, start, stored, train_step
from torch import nn, optim

from planaria.checkpoint import Checkpointer, Every, KeepLast, open_checkpoint
from planaria.checkpoint.capture import gate
from planaria.checkpoint.policies import keep_policy, save_policy
from planaria.core import points
from planaria.errors import (
    ConfigError,
    DeadlineError,
    NotCommittedError,
    SaveFailedError,
    StateError,
)

# Waiting


def test_a_handle_tells_how_far_a_save_is(tmp_path):
    state = start()
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        with held("checkpoint.write.end") as hold:
            handle = ckpt.save(3)
            hold.wait_reached()
            handle.wait_captured()
            assert (handle.step, handle.captured, handle.committed) == (3, True, False)
            with pytest.raises(DeadlineError, match="the commit of step 3"):
                handle.wait_committed(timeout_s=0.01)
        handle.wait_committed()
        assert (handle.committed, handle.error) == (True, None)
        assert handle.nbytes == open_checkpoint(tmp_path).manifest.files[0].data_nbytes


def check_the_gate_holds_the_step(path: Any, patience_s: float = 0.3) -> None:
    """An optimizer's step waits for the capture, so what is saved is what was at the call."""
    state = start()
    train_step(state)
    with Checkpointer(path, state, audit=True) as ckpt:
        expected = everything(state)
        with held("checkpoint.capture.chunk") as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            thread, done = in_background(lambda: train_step(state))
            early = done.wait(patience_s)
            now = everything(state)
            hold.go_on.set()
            thread.join()
        assert not early, "the optimizer's step did not wait"
        assert now["optim"] == expected["optim"]
        handle.wait_committed()
        assert everything(state) != expected, "and then it went on"
    assert stored(path, 1) == expected


def test_the_gate_holds_the_optimizers_step(tmp_path):
    check_the_gate_holds_the_step(tmp_path)


@pytest.mark.parametrize("how", ["before_update", "another_optimizer", "scaler", "restore"])
def test_the_gate_holds_others_too(how, tmp_path):
    state = start()
    other = nn.Linear(2, 2)
    other_optim = optim.SGD(other.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(other(torch.ones(1, 2)).sum()).backward()
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        ckpt.save(1).wait_committed()
        calls = {
            "before_update": ckpt.before_update,
            # What it would change is not known, so any optimizer waits.
            "another_optimizer": other_optim.step,
            "scaler": lambda: scaler.step(other_optim),
            "restore": lambda: ckpt.restore(step=1),
        }
        with held("checkpoint.capture.begin") as hold:
            ckpt.save(2)
            hold.wait_reached()
            thread, done = in_background(calls[how])
            assert not done.wait(0.2)
            hold.go_on.set()
            thread.join()
        assert done.is_set()


def test_the_gate_is_open_where_nothing_is_captured(tmp_path):
    state = start()
    with Checkpointer(tmp_path / "a", state) as first:
        train_step(state)
        second = Checkpointer(tmp_path / "b", start(2))
        with second, held("checkpoint.capture.begin") as hold:
            second.save(1)
            hold.wait_reached()
            thread, done = in_background(lambda: train_step(state))
            assert not done.wait(0.2), "also what another checkpointer captures"
            hold.go_on.set()
            thread.join()
        first.save(1).wait_committed()
    train_step(state)


def test_a_writer_that_is_slow_does_not_hold_the_step(tmp_path):
    """Only the capture is waited for: while step 1 is still being written, training goes on."""
    state = start()
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        train_step(state)
        expected = everything(state)
        with held("checkpoint.write.header") as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            train_step(state)
            train_step(state)
            assert not handle.committed
        handle.wait_committed()
    assert stored(tmp_path, 1) == expected


def test_three_saves_overlap_and_hold_what_was_at_their_calls(tmp_path):
    state, expected = start(), {}
    with (
        Checkpointer(tmp_path, state, audit=True) as ckpt,
        held("checkpoint.write.header") as hold,
    ):
        for step in (1, 2, 3):
            train_step(state)
            expected[step] = everything(state)
            ckpt.save(step)
        hold.wait_reached()
        train_step(state)
        assert ckpt.all_steps() == []
    assert [s for s in (1, 2, 3) if stored(tmp_path, s) == expected[s]] == [1, 2, 3]


def test_saving_slower_than_the_interval(tmp_path):
    state, expected = start(), {}
    with (
        points.armed("sleep=0.03@checkpoint.write.*:times=inf"),
        Checkpointer(tmp_path, state, every=1, audit=True) as ckpt,
    ):
        for step in range(1, 6):
            train_step(state)
            expected[step] = everything(state)
            assert ckpt.step(step) is not None
    assert all(stored(tmp_path, step) == expected[step] for step in expected)


def test_the_same_step_twice_is_written_twice(tmp_path):
    state = start()
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        ckpt.save(1)
        train_step(state)
        ckpt.save(1)
        expected = everything(state)
    assert len(data_files(tmp_path, 1)) == 1, "the first attempt's file is removed"
    assert stored(tmp_path, 1) == expected


# When to save and what to keep


def test_every_and_keep(tmp_path):
    state = start()
    with Checkpointer(tmp_path, state, every=2, keep=2, audit=True) as ckpt:
        saved = [n for n in range(1, 11) if ckpt.step(n) is not None]
        assert ckpt.step(10) is None, "already saved"
    assert saved == [2, 4, 6, 8, 10]
    assert ckpt.all_steps() == [8, 10]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000008", "step-00000010"]


def test_policies_of_ones_own(tmp_path):
    class Powers:
        def due(self, step: int) -> bool:
            return step & (step - 1) == 0

    class Even:
        def keep(self, steps: Sequence[int]) -> set[int]:
            return {s for s in steps if s % 4 == 0}

    with Checkpointer(tmp_path, start(), every=Powers(), keep=Even(), audit=True) as ckpt:
        for n in range(1, 20):
            ckpt.step(n)
    assert ckpt.all_steps() == [4, 8, 16]
    with Checkpointer(tmp_path, start(), keep=Even(), audit=True) as ckpt:
        ckpt.restore()
        ckpt.save(17)
    assert ckpt.all_steps() == [4, 8, 16, 17], "the newest is always kept"


def test_what_is_no_policy_is_refused(tmp_path):
    assert save_policy(None) is None
    assert keep_policy(None) is None
    assert save_policy(3) == Every(3)
    assert keep_policy(3) == KeepLast(3)
    for bad in (0, -1, 1.5, "2", True):
        with pytest.raises(ConfigError, match="every="):
            Checkpointer(tmp_path, start(), every=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="keep="):
            Checkpointer(tmp_path, start(), keep=bad)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.0, "1", None, True])
def test_what_is_no_step_is_refused(step, tmp_path):
    with (
        Checkpointer(tmp_path, start(), audit=True) as ckpt,
        pytest.raises(ConfigError, match="number of steps done"),
    ):
        ckpt.save(step)


def test_metrics_that_cannot_be_stored_are_named(tmp_path):
    with Checkpointer(tmp_path, start(), audit=True) as ckpt:
        with pytest.raises(StateError, match=r"'metrics\.fn'"):
            ckpt.save(1, {"fn": print})
        with pytest.raises(StateError, match=r"'metrics\.t'"):
            ckpt.save(2, {"t": torch.ones(2, device="meta")})
        with pytest.raises(ConfigError, match="metrics must be a dict"):
            ckpt.save(2, [0.5])  # type: ignore[arg-type]
        ckpt.save(3, {"per_class": torch.tensor([0.5, 0.25]), "t": torch.tensor(2)})
    metrics = open_checkpoint(tmp_path).metrics
    assert contents(metrics) == contents({"per_class": torch.tensor([0.5, 0.25]), "t": 2})
    assert ckpt.all_steps() == [3]


# Ending


def test_a_closed_checkpointer_refuses(tmp_path):
    state = start()
    ckpt = Checkpointer(tmp_path, state, audit=True)
    ckpt.save(1)
    ckpt.close()
    for call in (lambda: ckpt.save(2), lambda: ckpt.step(2), ckpt.restore):
        with pytest.raises(ConfigError, match="closed; make a new one"):
            call()
    ckpt.close()
    ckpt.before_update()
    train_step(state)
    assert (ckpt.all_steps(), ckpt.latest_step()) == ([1], 1)


def test_closing_ends_the_threads(tmp_path):
    before = set(threading.enumerate())
    ckpt = Checkpointer(tmp_path, start(), audit=True)
    ckpt.save(1)
    assert any(t.name.startswith("planaria-") for t in set(threading.enumerate()) - before)
    ckpt.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("planaria-")]


def test_closing_does_not_wait_for_ever(tmp_path):
    with held("checkpoint.write.header") as hold:
        ckpt = Checkpointer(tmp_path, start(), audit=True, on_failure="fatal")
        handle, threads = ckpt.save(1), ckpt._job.attached.pipeline._threads
        hold.wait_reached()
        ckpt._timeout_s = 0.2
        with pytest.raises(SaveFailedError, match=r"not through within 0\.2 s"):
            ckpt.close()
        assert isinstance(handle.error, SaveFailedError)
    for thread in threads:
        thread.join(60)


def test_a_stop_is_asked_for_and_saves_once(tmp_path):
    state = start()
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        assert ckpt.step(1) is None
        assert not ckpt.should_stop
        ckpt.request_stop()
        assert ckpt.step(2) is not None
        assert ckpt.should_stop
        assert ckpt.step(2) is None
    assert ckpt.all_steps() == [2]


# Other places


@pytest.fixture
def memory_url(request):
    import fsspec

    url = f"memory://{request.node.name}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_a_remote_root(memory_url):
    state, expected = start(), {}
    with Checkpointer(memory_url, state, every=1, keep=2, audit=True) as ckpt:
        for step in range(1, 5):
            train_step(state)
            expected[step] = everything(state)
            ckpt.step(step)
    assert ckpt.all_steps() == [3, 4]
    assert open_checkpoint(memory_url).verify() == []
    assert open_checkpoint(f"{memory_url}/step-00000003").step == 3
    assert stored(memory_url, 3) == expected[3]

    storage = open_checkpoint(memory_url)._root.storage
    for name in storage.list("step-00000004"):
        if name.endswith(".safetensors"):
            data = bytearray(storage.read(f"step-00000004/{name}"))
            data[-1] ^= 1
            storage.put(f"step-00000004/{name}", bytes(data))
    target = start(5)
    with pytest.warns(UserWarning, match="step 4 cannot be restored"):
        report = load_once(memory_url, target)
    assert report.step == 3
    assert [step for step, _ in report.fell_back_from] == [4]
    assert everything(target) == expected[3]
    (problem,) = open_checkpoint(memory_url, 4).verify()
    assert problem.chunk == 0


def test_rewinding_a_remote_root(memory_url):
    with Checkpointer(memory_url, start(), audit=True) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step)
    with Checkpointer(memory_url, start(), audit=True) as ckpt:
        ckpt.restore(step=1)
        ckpt.save(2).wait_committed()
        assert ckpt.all_steps() == [1, 2]
    with pytest.raises(NotCommittedError):
        open_checkpoint(memory_url, 5)


# Sabotage: each of these must be noticed by the checks above.


def test_sabotage_no_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "close_gate_for", lambda _: None)
    with pytest.warns(UserWarning, match="changed while being captured"):
        must_notice(check_the_gate_holds_the_step, tmp_path, 60)
