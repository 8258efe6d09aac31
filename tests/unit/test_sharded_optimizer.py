"""An optimizer over blocks: the bits of one rank at any world size, also across changes of it."""

from typing import Any

import pytest
import torch
from local_ranks import LocalTransport, on_threads
from reductions import MICRO_BATCHES, Net, tokens_of

from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import cut, shapes_of
from planaria.elastic.partition.moves import plan_moves
from planaria.elastic.partition.optimizer import ShardedOptimizer, segments
from planaria.elastic.partition.owners import Partition, respread, spread
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.reduction.transport import Alone, Transport
from planaria.errors import ConfigError, NotSupportedError

Options = dict[str, Any]
STEPS = 3


@pytest.fixture(autouse=True)
def _no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share the global generators."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x)


def make(name: str, model: Net, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with two groups, one without decay, and a scheduler."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = getattr(torch.optim, name)(groups, lr=0.05, **options)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


class Trainer:
    """A model on one rank, its optimizer's blocks, and a step of both."""

    def __init__(
        self, transport: Transport, name: str, dtype: torch.dtype, clip: float | None, **more: Any
    ) -> None:
        self.model, self.clip = Net(dtype), clip
        self.parameters = dict(self.model.named_parameters())
        self.base, self.scheduler = make(name, self.model, **more)
        self.adopt(transport, spread(cut(shapes_of(self.parameters), numel=24),
                                     range(transport.size)))  # fmt: skip
        self.norms: list[float] = []
        self.number = 0

    def adopt(self, transport: Transport, partition: Partition) -> None:
        self.partition = partition
        self.optimizer = ShardedOptimizer(self.parameters, self.base, partition, transport)
        self.reducer = GradientReducer(
            self.parameters,
            MICRO_BATCHES,
            assign(MICRO_BATCHES, transport.size),
            transport,
            segments=segments(partition),
            bucket_bytes=300,
        )

    def step(self) -> None:
        self.reducer.begin(Deadline(60))
        for index in self.reducer.order:
            with self.reducer.micro_batch(index):
                self.model(tokens_of(self.number, index), rare=index == 4).backward()
        update = self.optimizer.step(self.reducer.finish(), Deadline(60), clip_grad_norm=self.clip)
        self.scheduler.step()
        self.norms.append(update.norm)
        self.number += 1

    def bits(self) -> Any:
        return {n: p.detach().float().numpy().tobytes() for n, p in self.parameters.items()}, (
            self.norms
        )


def train(transport: Transport, *args: Any, **options: Any) -> Any:
    trainer = Trainer(transport, *args, **options)
    try:
        for _ in range(STEPS):
            trainer.step()
    finally:
        trainer.reducer.close()
    return trainer.bits()


KINDS = [
    ("AdamW", torch.float32, 0.5, {}),
    ("AdamW", torch.bfloat16, 0.5, {}),
    ("AdamW", torch.float32, None, {"fused": True}),
    ("SGD", torch.float16, None, {"momentum": 0.9}),
    ("Adagrad", torch.float32, 1e9, {}),
]


@pytest.mark.parametrize(("name", "dtype", "clip", "options"), KINDS)
def test_all_worlds_train_alike(
    name: str, dtype: torch.dtype, clip: float | None, options: Options
) -> None:
    alone = train(Alone(), name, dtype, clip, **options)
    for world in (2, 3, 4):
        assert (
            on_threads(world, lambda t: train(t, name, dtype, clip, **options)) == [alone] * world
        )


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_one_rank_trains_as_torch_does(name: str) -> None:
    """Against the plain optimizer on whole parameters, in float64."""
    found = Trainer(Alone(), name, torch.float64, 0.5)
    model = Net(torch.float64)
    optimizer, scheduler = make(name, model)
    for step in range(STEPS):
        found.step()
        optimizer.zero_grad()
        for index in range(MICRO_BATCHES):
            (model(tokens_of(step, index), rare=index == 4) / MICRO_BATCHES).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        assert found.norms[-1] == pytest.approx(float(norm))
    found.reducer.close()
    for name_, parameter in model.named_parameters():
        torch.testing.assert_close(found.parameters[name_], parameter)


class Elastic:
    """A run whose ranks change: survivors keep their trainer, joiners get a copy of a model."""

    def __init__(self, *kind: Any) -> None:
        self.kind = kind
        self.trainers: dict[int, Trainer] = {}
        self.partition: Partition | None = None

    def step(self, ranks: list[int]) -> None:
        """Changes to these ranks, then trains a step."""
        exported: dict[int, dict[str, Any]] = {}
        old = self.partition
        if old is not None:
            self.partition = respread(old, ranks)
            plan = plan_moves(old, self.partition)
            assert plan.moves or plan.recovered
            for i, owner in enumerate(old.owners):
                state = self.trainers[owner].optimizer.export(i)
                exported[i] = {key: value.clone() for key, value in state.items()}

        def change(transport: LocalTransport) -> Trainer:
            me = ranks[transport.rank]
            trainer = self.trainers.get(me) or Trainer(transport, *self.kind)
            if self.partition is not None:
                trainer.reducer.close()
                if me not in self.trainers:
                    _copy(self.trainers[0], trainer)
                trainer.adopt(transport, self.partition)
                for i in self.partition.of(me):
                    trainer.optimizer.load(i, exported[i])
            trainer.step()
            return trainer

        self.trainers = dict(zip(ranks, on_threads(len(ranks), change), strict=True))
        self.partition = self.trainers[0].partition


def _copy(source: Trainer, target: Trainer) -> None:
    """What a joiner is sent, but for blocks. The source cannot finish its step without it."""
    target.model.load_state_dict(source.model.state_dict())
    for mine, its in zip(target.base.param_groups, source.base.param_groups, strict=True):
        mine["lr"] = its["lr"]
    target.scheduler.load_state_dict(source.scheduler.state_dict())
    target.norms, target.number = list(source.norms), source.number


def test_a_run_goes_on_with_other_ranks() -> None:
    """3 ranks, then 2 of them, then 4: blocks move with their state, the bits stay."""
    kind = ("AdamW", torch.bfloat16, 0.5)
    alone = train(Alone(), *kind)
    run = Elastic(*kind)
    for ranks in ([0, 1, 2], [0, 2], [0, 2, 3, 5]):
        run.step(ranks)
    for trainer in run.trainers.values():
        assert trainer.bits() == alone
        trainer.reducer.close()


def test_a_gradient_that_is_not_finite_can_be_left_out() -> None:
    model = torch.nn.Linear(4, 4)
    parameters = dict(model.named_parameters())
    partition = spread(cut(shapes_of(parameters), numel=8), [0])
    base = torch.optim.AdamW(model.parameters())
    optimizer = ShardedOptimizer(parameters, base, partition, Alone())
    reducer = GradientReducer(parameters, 1, assign(1, 1), Alone(), segments=segments(partition))
    before = model.weight.detach().clone()
    for factor, applied in ((torch.inf, False), (1.0, True)):
        reducer.begin(Deadline(60))
        with reducer.micro_batch(0):
            (model(torch.ones(4)).sum() * factor).backward()
        update = optimizer.step(reducer.finish(), Deadline(60), skip_nonfinite=True)
        assert update.applied is applied
        assert torch.equal(before, model.weight) is not applied
    assert bool(model.weight.isfinite().all())
    reducer.close()


def test_what_cannot_be_spread_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    parameters = dict(model.named_parameters())

    def spread_it(optimizer: torch.optim.Optimizer, numel: int = 8) -> None:
        blocks = cut(shapes_of(parameters), numel=numel)
        ShardedOptimizer(parameters, optimizer, spread(blocks, [0]), Alone())

    with pytest.raises(NotSupportedError, match="LBFGS"):
        spread_it(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match="may look at a whole tensor"):
        spread_it(torch.optim.Adafactor(model.parameters()))
    spread_it(torch.optim.Adafactor(model.parameters()), numel=16)
    with pytest.raises(ConfigError, match="'bias' is not a parameter of the optimizer"):
        spread_it(torch.optim.SGD([model.weight], lr=0.1))
    with pytest.raises(ConfigError, match="on a transport of 1"):
        ShardedOptimizer(parameters, torch.optim.SGD(model.parameters()),
                         spread(cut(shapes_of(parameters)), [0, 1]), Alone())  # fmt: skip


def test_state_that_is_there_is_taken_over() -> None:
    """From a plain AdamW in mid-run to blocks: goes on as the plain one does."""
    plain = Net(torch.float64)
    optimizer, _ = make("AdamW", plain)
    for index in range(2):
        optimizer.zero_grad()
        plain(tokens_of(0, index), rare=True).backward()
        optimizer.step()
    found = Trainer(Alone(), "AdamW", torch.float64, None)
    found.model.load_state_dict(plain.state_dict())
    found.base.load_state_dict(optimizer.state_dict())
    found.reducer.close()
    found.adopt(Alone(), found.partition)
    found.step()
    found.reducer.close()
    optimizer.zero_grad()
    for index in range(MICRO_BATCHES):
        (plain(tokens_of(0, index), rare=index == 4) / MICRO_BATCHES).backward()
    optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found.parameters[name], parameter)


def test_blocks_cut_by_rank_are_noticed() -> None:
    """Sabotage: each world cuts its own blocks; the sums of their norms differ."""
    norms = set()
    for world in (1, 2, 3, 5):
        model = Net()
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
        total = 0.0
        for block in cut(shapes_of(parameters), numel=60 // world):
            grad = parameters[block.name].grad
            assert grad is not None
            part = grad.view(-1)[block.start : block.stop] * 1.1
            total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        norms.add(total)
    assert len(norms) > 1
