"""Ranks whose clocks, signals and measurements differ save the same steps, and wait for nobody."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import must_notice
from ranks import run_ranks
from trainings import checkpointer

from planaria.checkpoint import Adaptive, EverySeconds, OnSignal
from planaria.checkpoint.decide import Decisions
from planaria.errors import ConfigError

STEPS = 24


def policies() -> dict[str, Any]:
    """Made on each rank anew."""
    return {
        "seconds": EverySeconds(10),
        "union": EverySeconds(10) | OnSignal(),
        "signal": OnSignal(),
        "adaptive": Adaptive(0.1),
    }


def train(rank: int, root: Path, name: str, sabotaged: bool = False) -> list[int]:
    """Trains with a clock that is this rank's own; returns at which steps it saved."""
    now = rank * 1e6  # seconds
    saved = []

    def clock() -> float:
        return now

    Decisions.clock = staticmethod(clock)  # pyright: ignore[reportAttributeAccessIssue]
    if sabotaged:
        Decisions.save_due = decide_alone  # type: ignore[method-assign]
    with checkpointer(root, {"v": {"w": torch.zeros(2)}}, every=policies()[name]) as ckpt:
        for step in range(1, STEPS + 1):
            now += 3.0 + 4.1 * rank  # rank 1's clock runs faster, too
            if step == 7 and rank == 1 and name in ("signal", "union"):
                os.kill(os.getpid(), signal.SIGUSR1)
            handle = ckpt.step(step)
            if handle is not None:
                saved.append(step)
                if not sabotaged:  # then nobody would come
                    handle.wait_committed()
    assert ckpt.all_steps() == saved
    return saved


def decide_alone(self: Decisions, n: int) -> bool:
    """Sabotage: each rank does what it wants itself."""
    now = self.clock()
    due = now - self._began >= 10
    if due:
        self._began = now
    return due


def check_agreed(root: Path, name: str, sabotaged: bool = False) -> list[int]:
    try:
        first, second = run_ranks(2, train, root, name, sabotaged)
    except Exception as error:
        raise AssertionError(f"ranks did not agree: {error}") from error
    assert first == second
    return first


def test_rank_0s_clock_decides(tmp_path: Path) -> None:
    # 12 s after the last save rank 0 wants one, and all make it at the next step.
    assert check_agreed(tmp_path, "seconds") == [5, 10, 15, 20]


def test_a_signal_to_any_rank_counts(tmp_path: Path) -> None:
    assert check_agreed(tmp_path / "signal", "signal") == [8]
    assert check_agreed(tmp_path / "union", "union") == [5, 8, 13, 18, 23]


def test_what_rank_0_measures_decides(tmp_path: Path) -> None:
    saved = check_agreed(tmp_path, "adaptive")
    # Without anything that costs, an undisturbed step and the vote lie between two saves.
    assert saved[0] == 5
    assert len(saved) > 3


def test_sabotage_every_rank_decides_for_itself(tmp_path: Path) -> None:
    check: Callable[..., Any] = check_agreed
    must_notice(check, tmp_path, "seconds", True)


def made_in_a_thread(rank: int, root: Path) -> str:
    """On rank 1 the policy cannot have its signal; all must learn of it."""

    def make() -> str:
        try:
            checkpointer(root, {"v": {"w": torch.zeros(2)}}, every=OnSignal())
        except ConfigError as error:
            return str(error)
        return "made"

    if rank == 0:
        return make()
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(make()))
    thread.start()
    thread.join()
    return said[0]


def test_a_policy_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, made_in_a_thread, tmp_path)
    assert "main thread" in second
    assert first.startswith("rank 1: ")
    assert "main thread" in first
