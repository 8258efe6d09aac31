"""A session of one rank: what it computes, what it refuses, what a loop may do."""

import copy
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from planaria.core.deadline import Deadline
from planaria.elastic import GlobalBatch, Session, generations, session
from planaria.elastic.membership import Alone, Standing, View
from planaria.elastic.replicated import digest_tensor
from planaria.errors import CertificateError, ConfigError, DeadlineError, NotSupportedError


def make(model: torch.nn.Module, **options: Any) -> tuple[Session, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = GlobalBatch(Vectors(), 8, 2, seed=1)
    options = {"steps": 3, "membership": Alone(), **options}
    return Session(model, optimizer, data, **options), optimizer


class Vectors:
    """Random vectors, and how many of their elements count."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def train(model: torch.nn.Module, loss: Any) -> None:
    session, _ = make(model)
    with session:
        for step in session:
            with step:
                for batch in step.micro_batches():
                    step.backward(loss(model, batch))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_trains_as_plain_torch_does(stage: int) -> None:
    model = torch.nn.Linear(4, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    session, _ = make(model, zero_stage=stage, clip_grad_norm=0.3)
    data = GlobalBatch(Vectors(), 8, 2, seed=1)
    with session:
        for step in session:
            with step:
                for batch in step.micro_batches():
                    step.backward(loss_of(model, batch.double()))
            optimizer.zero_grad()
            losses = [loss_of(plain, batch.double()) for _, batch in
                      data.micro_batches(step.number, 0, 1)]  # fmt: skip
            loss = torch.stack(losses).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
            optimizer.step()
            assert step.committed
            assert step.applied
            assert step.metrics["loss"] == pytest.approx(loss.item())
            assert step.metrics["grad_norm"] == pytest.approx(float(norm))
    assert session.step == 3
    assert not session.stopped
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_steps_that_are_not_finite_are_left_out_and_the_scale_is_halved() -> None:
    model = torch.nn.Linear(4, 4)
    session, _ = make(model, loss_scale="dynamic")
    before = [p.detach().clone() for p in model.parameters()]
    with session:
        for step in session:
            with step:
                for batch in step.micro_batches():
                    factor = torch.inf if step.number == 0 else 1.0
                    step.backward(loss_of(model, batch) * factor)
            assert step.applied is (step.number > 0)
            if step.number == 0:
                assert all(map(torch.equal, before, model.parameters()))
    assert session.scale is not None
    assert session.scale.value == 32768.0


def test_metrics_are_weighted_means_of_what_was_logged() -> None:
    model = torch.nn.Linear(4, 4)
    session, _ = make(model, steps=1)
    with session:
        for step in session:
            with step:
                for i, batch in enumerate(step.micro_batches()):
                    if i % 2:
                        step.log(odd=i)
                    step.log(**{"long " * 50 + str(n): float(n) for n in range(20)})
                    step.backward(loss_of(model, batch), weight=i + 1.0)
            assert step.metrics["odd"] == pytest.approx((1 * 2 + 3 * 4) / 6)
            assert step.metrics["long " * 50 + "19"] == 19.0


def test_a_stop_ends_the_loop_after_the_step() -> None:
    model = torch.nn.Linear(4, 4)
    session, _ = make(model, steps=9)
    with session:
        for step in session:
            if step.number == 2:
                session.request_stop()
            with step:
                for batch in step.micro_batches():
                    step.backward(loss_of(model, batch))
    assert session.step == 3
    assert session.stopped


class Counting(torch.nn.Linear):
    """Writes a buffer in forward."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(()), persistent=persistent)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.seen, torch.Tensor)
        self.seen += 1
        return super().forward(input)


def test_buffers_that_forward_writes_are_refused_by_name() -> None:
    with pytest.raises(NotSupportedError, match=r"'0' is a BatchNorm1d .* running_mean"):
        make(torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
    for persistent in (True, False):
        with pytest.raises(NotSupportedError, match="buffer 'seen' was written"):
            train(Counting(persistent), loss_of)


def test_large_state_that_is_changed_inside_of_a_step_is_refused_by_name() -> None:
    """It is not copied at every step, so it could not be put back."""
    average, model = torch.nn.Linear(600, 600), torch.nn.Linear(4, 4)
    after = torch.zeros(1 << 19)
    session, _ = make(model, state={"average": average, "after": after})

    def loop() -> None:
        for step in session:
            with step:
                for batch in step.micro_batches():
                    step.backward(loss_of(model, batch))
                if step.number == 1:
                    average.weight.detach().mul_(0.5)
            after.add_(1)

    with session, pytest.raises(ConfigError, match=r"state\['average'\] .* changed inside"):
        loop()
    assert session.step == 1


def test_digests_of_all_elements_notice_any() -> None:
    """Samples are for large models, between generations that are looked at in full."""
    one, other = torch.zeros(5000), torch.zeros(5000)
    other[1] = 1.0
    assert digest_tensor(one, 1024) == digest_tensor(other, 1024)
    assert digest_tensor(one, None) != digest_tensor(other, None)


def test_loops_that_are_wrong_are_told() -> None:
    model, last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def loop(body: Any) -> None:
        session, _ = make(torch.nn.Sequential(model, last))
        with session:
            for step in session:
                body(step)

    def forgets_backward(step: Any) -> None:
        with step:
            list(step.micro_batches())

    def stops_early(step: Any) -> None:
        with step:
            for batch in step.micro_batches():
                step.backward(loss_of(model, batch))
                break

    def twice(step: Any) -> None:
        with step:
            for batch in step.micro_batches():
                step.backward(loss_of(model, batch))
                step.backward(loss_of(model, batch))

    def fails(grad: torch.Tensor) -> None:
        raise LookupError("after the gradients of the last layer")

    def goes_on_after_it_failed(step: Any) -> None:
        with step:
            for batch in step.micro_batches():
                inner = model(batch)
                inner.register_hook(fails)
                with suppress(LookupError):
                    step.backward(last(inner).square().mean())

    for body, says in (
        (forgets_backward, "had no step.backward"),
        (goes_on_after_it_failed, "or one that failed"),
        (stops_early, "go through all of"),
        (twice, "once for each batch"),
        (lambda step: None, "with step:"),
        (lambda step: step.log(a=1), "within the loop"),
    ):
        with pytest.raises(ConfigError, match=says):
            loop(body)


def test_an_error_of_the_loop_is_the_loops() -> None:
    def fails(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise LookupError("in the loop")

    with pytest.raises(LookupError, match="in the loop"):
        train(torch.nn.Linear(4, 4), fails)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"zero_stage": 3}, "choose 0, 1 or 2"),
        ({"redundancy": -1}, "0 or more"),
        ({"steps": None}, "how many steps"),
        ({"state": {"data": {}}}, "parts named"),
        ({"state": {"x": 3}}, "cannot be brought"),
        ({"loss_scale": -1.0}, "above 0"),
        ({"consistency": "nearly"}, "bitwise"),
        ({"links": "mail"}, "choose 'host' or 'nccl'"),
        ({"links": "nccl"}, "on a CUDA device"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says), make(torch.nn.Linear(4, 4), **options)[0]:
        pass


def test_ranks_with_other_code_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same version, too: they would plan otherwise, and wait for what nobody sends."""
    said = []

    class Listening(Alone):
        def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
            said.append(facts)
            return super().join(facts, deadline)

    folder = Path(session.__file__).parent
    copy_of = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.pyc"))
    for _ in range(3):
        monkeypatch.setattr(session, "__file__", str(copy_of / "session.py"))
        with make(torch.nn.Linear(4, 4), membership=Listening())[0]:
            pass
        if len(said) == 2:
            (copy_of / "partition" / "owners.py").write_text("# other")
    assert said[0] == said[1]
    assert [name for name in said[0] if said[0][name] != said[2][name]] == ["planaria"]


def test_data_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no lost rank: going on without one would ask for it for ever."""
    asked = []

    def late(self: GlobalBatch, step: int, **_: Any) -> Any:
        asked.append(step)
        assert len(asked) < 3, "it was asked for again and again"
        yield 0, torch.ones(2, 4)
        raise DeadlineError("the workers did not deliver")

    monkeypatch.setattr(GlobalBatch, "micro_batches", late)
    with pytest.raises(DeadlineError, match="did not deliver"):
        train(torch.nn.Linear(4, 4), loss_of)


class Doomed(Alone):
    """Loses somebody when it is told to, and goes on alone."""

    lost = False

    def disturbed(self) -> bool:
        return self.lost

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        self.lost = False
        return super().regroup(standing, deadline)


def test_a_loss_is_noticed_within_a_backward_pass() -> None:
    """What would be computed after it is of no use; the step comes again with the same bits."""

    def run(doomed: bool) -> tuple[list[int], list[bytes]]:
        torch.manual_seed(0)
        first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        model, membership = torch.nn.Sequential(first, second), Doomed()
        session, _ = make(model, membership=membership)
        reached: list[int] = []
        first.weight.register_hook(lambda grad: reached.append(session.step))
        with session:
            for step in session:
                with step:
                    for batch in step.micro_batches():
                        inner = first(batch)
                        if doomed and step.number == 1 and not step.attempt:
                            inner.register_hook(lambda grad: setattr(membership, "lost", True))
                        try:
                            step.backward(second(inner).square().mean())
                        finally:
                            grads = [p.grad for p in model.parameters()]
                            assert grads == [None] * 4, "some were left for whoever comes next"
        return reached, [p.detach().numpy().tobytes() for p in model.parameters()]

    # The first layer's gradient of the micro-batch that was cut short was not reached.
    assert run(True) == run(False)


@pytest.mark.parametrize("times", [1, 100])
def test_a_loop_does_not_go_on_from_a_recovery_that_failed(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Whatever it catches: the next step begins once all are certified, or not at all."""
    certify, asked = generations.certify_members, []

    def differ(*args: Any) -> Any:
        asked.append(0)
        if 1 < len(asked) <= 1 + times:
            raise CertificateError("copies differ")
        return certify(*args)

    monkeypatch.setattr(generations, "certify_members", differ)
    model, membership, done = torch.nn.Linear(4, 4), Doomed(), []
    session, _ = make(model, membership=membership)
    ends = nullcontext() if times == 1 else pytest.raises(CertificateError, match="copies differ")
    with ends, session:
        for step in session:
            with suppress(CertificateError), step:
                for batch in step.micro_batches():
                    membership.lost = step.number == 1 and not step.attempt
                    step.backward(loss_of(model, batch))
            done += [step.number] if step.committed else []
    assert done == ([0, 1, 2] if times == 1 else [0])
    assert len(asked) == 3, "the first one, the one that failed, and once more"
