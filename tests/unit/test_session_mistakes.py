"""Loops that catch errors, and mistakes of a loop's that nothing else would tell of."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planaria.checkpoint import LATER, Checkpointer, open_checkpoint
from planaria.core import points
from planaria.elastic import GlobalBatch
from planaria.elastic.membership import Alone
from planaria.elastic.membership.view import Standing, View
from planaria.elastic.scale import LossScale
from planaria.elastic.session import Session
from planaria.elastic.user_state import UserState
from planaria.errors import (
    CollectiveError,
    ConfigError,
    NotSupportedError,
    StateError,
    StoppedError,
)


class Vectors:
    """Random vectors."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def make(model: torch.nn.Module, **options: Any) -> tuple[Session, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"steps": 3, "membership": Alone(), **options}
    return Session(model, optimizer, GlobalBatch(Vectors(), 8, 2, seed=1), **options), optimizer


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def net() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


def bits(model: torch.nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def run(session: Session, before: Any = None, loss: Any = loss_of) -> None:
    with session:
        for step in session:
            if before is not None:
                before(step)
            with step:
                for batch in step.micro_batches():
                    step.backward(loss(session.model, batch))


class Unlucky:
    """A loop that runs out of memory once, at one place, and goes on."""

    def __init__(self, where: str) -> None:
        self.model, self.counted, self.where = net(), {"seen": 0}, where
        self.attempts: list[tuple[int, int]] = []

    def fail(self, step: Any, micro_batch: int, where: str) -> None:
        if where == self.where and (step.number, micro_batch) == (1, 3):
            self.where = ""
            raise MemoryError

    def run(self) -> "Unlucky":
        session, _ = make(self.model, state={"counted": self.counted})
        with session:
            for step in session:
                try:
                    with step:
                        for i, batch in enumerate(step.micro_batches()):
                            self.counted["seen"] += 1
                            self.fail(step, i, "before backward")
                            step.backward(loss_of(self.model, batch))
                            self.fail(step, i, "after backward")
                except MemoryError:
                    continue
                self.attempts.append((step.number, step.attempt))
        return self

    @property
    def result(self) -> Any:
        return bits(self.model), self.counted


@pytest.mark.parametrize("where", ["before backward", "after backward"])
def test_a_loop_may_catch_an_error_and_go_on(where: str) -> None:
    """The step is carried out again, with the state that it began with."""
    unlucky = Unlucky(where).run()
    assert unlucky.attempts == [(0, 0), (1, 1), (2, 0)]
    assert unlucky.result == Unlucky("").run().result


def test_a_step_that_was_applied_in_part_is_not_gone_on_from() -> None:
    class Breaks(torch.optim.lr_scheduler.ExponentialLR):
        def step(self, epoch: Any = None) -> None:
            if self.last_epoch == 1:
                raise ValueError("no rate")
            super().step(epoch)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = GlobalBatch(Vectors(), 8, 2, seed=1)
    session = Session(model, optimizer, data, steps=3, scheduler=Breaks(optimizer, 0.9),
                      membership=Alone())  # fmt: skip

    def loop() -> None:
        for step in session:
            try:
                with step:
                    for batch in step.micro_batches():
                        step.backward(loss_of(model, batch))
            except ValueError:
                continue

    with pytest.raises(StateError, match=r"step 1 was committed.*no rate.*end"), session:
        loop()


def lose_all_once(step: int) -> dict[str, Any]:
    """A callback for a fault point that makes a rank regroup at a step, once."""
    left = [step]

    def act(name: str, number: int | None) -> None:
        if number in left:
            left.clear()
            raise CollectiveError("as if a rank were lost")

    return {"elastic.session.prepared": act}


def freeze(model: torch.nn.Sequential, step: Any) -> None:
    model[0].requires_grad_(step.number not in (1, 2))


def test_parameters_may_be_frozen_for_a_while_whatever_happens_meanwhile() -> None:
    found = []
    for lost in (-1, 1):
        model = net()
        session, _ = make(model, steps=5)
        with points.armed(callbacks=lose_all_once(lost)):
            run(session, lambda step, model=model: freeze(model, step))
        found.append(bits(model))
    assert found[0] == found[1]
    untouched, model = net(), net()
    run(make(model, steps=3)[0], lambda step: model[0].requires_grad_(False))
    assert torch.equal(model[0].weight, untouched[0].weight)


def test_what_is_unfrozen_in_the_midst_is_refused_by_name() -> None:
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'0.weight' was frozen when the session was made"):
        run(make(model)[0], lambda step: model[0].requires_grad_(step.number == 1))


def test_parameters_may_get_other_memory() -> None:
    found = []
    for moves in (False, True):
        model = net()

        def move(step: Any, model: Any = model, moves: bool = moves) -> None:
            if moves and step.number == 1:
                for p in model.parameters():
                    p.data = p.data.clone()

        run(make(model)[0], move)
        found.append(bits(model))
    assert found[0] == found[1]


class Hidden(torch.nn.Linear):
    """Writes a buffer past torch's counting of versions."""

    seen: torch.Tensor

    def __init__(self, way: str) -> None:
        super().__init__(4, 4)
        self.way = way
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.way == "data":
            self.seen.data.add_(1)
        elif self.way == "numpy":
            self.seen.numpy()[...] += 1
        else:
            self.seen = self.seen + 0
        return super().forward(input)


@pytest.mark.parametrize("way", ["data", "numpy", "another tensor"])
def test_buffers_that_are_written_past_their_version_are_refused(way: str) -> None:
    with pytest.raises(NotSupportedError, match="buffer 'seen' was written"):
        run(make(Hidden(way))[0])


def test_buffers_of_inference_are_no_hindrance() -> None:
    model = net()
    with torch.inference_mode():
        table = torch.zeros(3)
    model.register_buffer("table", table)
    run(make(model)[0])


class Copies:
    """State that is copied whenever it is asked for."""

    def __init__(self) -> None:
        self.value = torch.zeros(1 << 19)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


def test_large_state_is_looked_at_however_it_is_held() -> None:
    copies, array = Copies(), np.zeros(1 << 18)
    number = {"big": torch.zeros(1 << 19), "steps": 0}
    state = UserState({"copies": copies, "array": [array], "number": number})
    state.begin()
    state.check()
    copies.value[7] = 1
    with pytest.raises(ConfigError, match=r"state\['copies'\]"):
        state.check()
    state.begin()
    array[3] = 1
    with pytest.raises(ConfigError, match=r"state\['array'\]"):
        state.check()
    state.begin()
    number["steps"] += 1
    with pytest.raises(ConfigError, match=r"state\['number'\]"):
        state.check()


def test_what_is_put_back_is_of_the_kind_that_it_was() -> None:
    with torch.inference_mode():
        still = torch.zeros(2)
    state = {"counts": Counter(a=1), "value": torch.zeros(2), "still": still}
    parts = UserState({"all": state})
    parts.begin()
    state["counts"]["b"] += 2
    state["value"] = state["value"].double() + 1
    parts.put_back()
    assert state["counts"] == Counter(a=1)
    assert torch.equal(state["value"], torch.zeros(2))


def test_a_scale_stays_above_nothing() -> None:
    scale = LossScale("dynamic")
    for _ in range(2000):
        scale.update(False)
    assert 0 < scale.value < 1e-30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip_grad_norm": 0.0}, "clip_grad_norm=0.0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm=nan"),
        ({"facts": {"lr": float("inf")}}, r"facts\['lr'\] is inf"),
        ({"facts": {"where": Path("x")}}, r"facts\['where'\]"),
        ({"state": {"x": {"y": object()}}}, r"brought to a rank that joins.*state\['x'\].y"),
    ],
)
def test_arguments_that_would_break_later_are_refused_now(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make(net(), **options)


class Asked(Alone):
    """Says what is asked of it as an agent would have it: as JSON."""

    def join(self, facts: Any, deadline: Any) -> View:
        json.dumps(facts, allow_nan=False)
        return super().join(facts, deadline)


def test_an_infinite_norm_to_clip_to_is_none() -> None:
    found = []
    for clip in (None, float("inf")):
        model = net()
        run(make(model, clip_grad_norm=clip, membership=Asked())[0])
        found.append(bits(model))
    assert found[0] == found[1]


def test_wrappers_and_schedulers_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(NotSupportedError, match=r"DataParallel.* give it the plain module"):
        make(torch.nn.DataParallel(net()))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(NotSupportedError, match="needs metrics"):
        make(model, scheduler=plateau)


def test_losses_of_several_numbers_and_second_entries_are_told() -> None:
    with pytest.raises(ConfigError, match=r"shape \[2, 4\]"):
        run(make(net())[0], loss=lambda model, batch: model(batch))
    session, optimizer = make(net())
    run(session)
    with pytest.raises(ConfigError, match="entered once"):
        run(session)
    session, optimizer = make(net())

    def more(step: Any) -> None:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    with pytest.raises(ConfigError, match="other groups"):
        run(session, more)


def test_checkpoints_know_no_wrappers_names(tmp_path: Path) -> None:
    for steps, compiled in ((2, True), (4, False)):
        plain = net()
        model: Any = torch.compile(plain, backend="eager") if compiled else plain
        with Checkpointer(tmp_path, {"model": model}, every=1, process_group=LATER) as ckpt:
            session, _ = make(model, steps=steps, checkpointer=ckpt)
            run(session)
        assert session.step == steps
    names = open_checkpoint(tmp_path).names()
    assert not [name for name in names if "_orig_mod" in name]
    reference = net()
    run(make(reference, steps=4)[0])
    assert bits(plain) == bits(reference)


def test_a_rank_alone_saves_what_it_began_to_when_its_loop_fails(tmp_path: Path) -> None:
    def fail(step: Any) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        Checkpointer(tmp_path, {"model": net()}, every=1, process_group=LATER) as ckpt,
    ):
        run(make(net(), checkpointer=ckpt)[0], fail)
    assert open_checkpoint(tmp_path).step == 2


def test_a_loop_that_is_left_is_told_how_to_end(caplog: pytest.LogCaptureFixture) -> None:
    session, _ = make(net())
    with session, caplog.at_level(logging.WARNING):
        for step in session:
            with step:
                for batch in step.micro_batches():
                    step.backward(loss_of(session.model, batch))
            break
    assert "left after step 1 of 3" in caplog.text
    assert "request_stop" in caplog.text


class TooFew(Alone):
    """After a loss there is one generation left, to save in."""

    told: tuple[bool, ...] = ()

    def regroup(self, standing: Standing, deadline: Any) -> View:
        return View(standing.generation + 1, (0,), 0, step=standing.committed, last="too few")

    def finish(self, deadline: Any, *, complete: bool = False) -> None:
        self.told = (*self.told, complete)


@pytest.mark.parametrize("lost_at", [1, 2])
def test_a_last_generation_stops_a_run_that_has_steps_left(lost_at: int) -> None:
    members = TooFew()
    session, _ = make(net(), steps=3, membership=members)

    def loop() -> None:
        with points.armed(callbacks={"elastic.session.done": _lost(lost_at)}):
            run(session)

    if lost_at == 1:
        with pytest.raises(StoppedError, match="too few"):
            loop()
        assert members.told == (False,)
    else:
        loop()  # all steps are done
        assert members.told == (True,)
        assert not session.stopped


def _lost(step: int) -> Any:
    def act(name: str, number: int | None) -> None:
        if number == step:
            raise CollectiveError("as if a rank were lost")

    return act
