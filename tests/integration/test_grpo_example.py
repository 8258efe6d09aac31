"""The GRPO example: its parts at a tiny size, and in `make soak` a reward that rises."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # By name, as the rollout processes import it, too.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module("grpo_sync")
    torch.set_num_threads(threads)
    for name in ("grpo_sync", "arithmetic"):
        sys.modules.pop(name, None)


def options(example: Any, folder: Path, **more: Any) -> Any:
    args = example.options().parse_args([])
    vars(args).update({"out": str(folder), "timeout": 200.0} | more)
    return args


def test_versions_arrive_bit_equal_and_everything_ends(
    example: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ranks._server()
    # Processes that are forked off one which has loaded everything: seconds sooner.
    monkeypatch.setattr(example.multiprocessing, "get_context", lambda kind: server)
    true, calls = example.fingerprint, []

    def fingerprint(model: torch.nn.Module) -> str:  # the trainer's; rollouts have their own
        calls.append(1)
        return "other bits" if len(calls) == 3 else true(model)

    monkeypatch.setattr(example, "fingerprint", fingerprint)
    small = {"steps": 4, "questions": 4, "group": 4, "dim": 16, "text_steps": 20, "rate": 1e7}
    got = example.run(options(example, tmp_path, **small, kl=0.01))
    assert set(got["unequal"]) == {2}  # what is no version of the trainer's would be noticed
    assert 0 < got["bytes"] <= got["dense"] + 4096
    said = capsys.readouterr().out
    assert f"bit for bit by all rollouts: {not got['unequal']}" in said
    assert (tmp_path / "grpo_sync.png").exists() == ("plot: " in said)
    assert not example.multiprocessing.active_children()


def test_the_plot_is_left_out_without_matplotlib(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figures = example.Figures(1e6)
    assert "matplotlib" in figures.draw(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_questions_and_answers_are_what_they_should_be(example: Any) -> None:
    task = sys.modules["arithmetic"]
    questions = torch.tensor([4738, 9999, 5])
    text = torch.cat([task.prompts_of(questions), task.answers_of(questions)], dim=1)
    assert ["".join("0123456789+="[t] for t in row) for row in text.tolist()] == [
        "47+38=085", "99+99=198", "00+05=005",
    ]  # fmt: skip


def test_the_loss_is_that_of_every_answer_on_its_own(example: Any) -> None:
    task = sys.modules["arithmetic"]
    model = task.new_model(16)
    questions = torch.tensor([1234, 777, 42]).repeat_interleave(6)
    generator = torch.Generator().manual_seed(0)
    given, old = task.answer(model, task.prompts_of(questions), generator)
    text = torch.cat([task.prompts_of(questions), given], dim=1)
    text[1], old[1] = text[0], old[0]  # equal answers are computed once, and count twice
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0] + [0.0] * 6 + [0.0, 1, 0, 0, 0, 0])
    found = task.grpo_loss(model, text, old - 0.3, rewards, 6)
    grouped = rewards.view(3, 6)
    gain = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    gain, kept = gain.view(-1, 1), np.r_[0:6, 12:18]
    ratio = (task.log_probabilities(model, text) - (old - 0.3)).exp()
    each = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.25) * gain)
    assert torch.allclose(found, each[kept].mean(), atol=1e-6)
    nothing = task.grpo_loss(model, text, old, torch.ones(18), 6)
    assert nothing.item() == 0
    nothing.backward()


@pytest.mark.soak
def test_the_reward_rises(example: Any, tmp_path: Path) -> None:
    got = example.run(options(example, tmp_path, steps=200))
    assert got["last"] > got["first"] + 0.12
    assert got["after"] > got["before"] + 0.12
    assert not got["unequal"]
