"""Trainers of every kind on several ranks, rollouts of other layouts, and a change of both."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from rl_models import Tied, nudge, rollout, trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from planaria.checkpoint import Fuse, Pad, Rename, Split
from planaria.core import points
from planaria.errors import ConfigError, MismatchError, SyncError
from planaria.rl_sync import Publisher, RolloutLayout, Subscriber
from planaria.rl_sync.versions.ahead import ReadAhead

BF16 = torch.bfloat16


class Attention(nn.Module):
    """The projections of a layer, under the names that trainers use."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.norm = nn.LayerNorm(16)
        self.experts = nn.ModuleList(nn.Linear(16, 6, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.o(torch.cat([self.k(x), self.v(x)], -1) + self.q(x))
        y = self.norm(x + y)
        return (self.gate(y) * self.up(y)).sum(-1) + sum(e(y).sum(-1) for e in self.experts)


LAYOUT = RolloutLayout(
    transforms=[
        Fuse(["q.weight", "k.weight", "v.weight"], "qkv_proj.weight"),
        Fuse(["q.bias", "k.bias", "v.bias"], "qkv_proj.bias"),
        Fuse(["gate.weight", "up.weight"], "gate_up_proj.weight"),
        Rename("o.weight", "o_proj.weight"),
        Rename("experts.*.weight", "moe.w*"),
    ],
    shards=2,
    cuts={"qkv_proj.*": 0, "gate_up_proj.*": 0, "o_proj.*": 1},
)


def engine(shard: int) -> dict[str, torch.Tensor]:
    """The tensors of one of two shards of an inference engine."""
    shapes = {"qkv_proj.weight": (16, 16), "qkv_proj.bias": (16,), "gate_up_proj.weight": (24, 16),
              "o_proj.weight": (16, 8), "norm.weight": (16,), "norm.bias": (16,),
              "moe.w0": (6, 16), "moe.w1": (6, 16)}  # fmt: skip
    return {name: torch.full(shape, float(shard), dtype=BF16) for name, shape in shapes.items()}


def expected(full: dict[str, torch.Tensor], shard: int) -> dict[str, torch.Tensor]:
    """The same by plain torch, from whole tensors."""
    full = {k: v.to(BF16) for k, v in full.items()}

    def cut(name: str, dim: int = 0) -> torch.Tensor:
        return full[name].chunk(2, dim)[shard]

    return {
        "qkv_proj.weight": torch.cat([cut(f"{n}.weight") for n in "qkv"]),
        "qkv_proj.bias": torch.cat([cut(f"{n}.bias") for n in "qkv"]),
        "gate_up_proj.weight": torch.cat([cut("gate.weight"), cut("up.weight")]),
        "o_proj.weight": cut("o.weight", 1),
        "norm.weight": full["norm.weight"], "norm.bias": full["norm.bias"],
        "moe.w0": full["experts.0.weight"], "moe.w1": full["experts.1.weight"],
    }  # fmt: skip


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers in full; a collective where they are sharded."""
    found = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        found[name.removeprefix("module.")] = value.detach().clone()
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].view(torch.int16), b[k].contiguous().view(torch.int16)) for k in a
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


def prepared(kind: str, model: nn.Module) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        return fully_shard(model)
    if kind == "fsdp+tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan: Any = {"q": ColwiseParallel(), "gate": ColwiseParallel(), "up": ColwiseParallel()}
        parallelize_module(model, mesh["tp"], plan | {"o": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["dp"])
    return model


def follow(rank: int, kind: str) -> int:
    torch.manual_seed(0)
    model = prepared(kind, Attention())
    if kind == "fsdp+tp":
        optimizer = None  # forward through mixed layouts is not what is tested here
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shards = [engine(i) for i in range(2)]
    subscribers = []
    sent = 0
    on_device = kind.startswith("fsdp")  # both kinds of scan, see test_rl_device_scan.py
    options: Any = {"block_elements": 150, "timeout": 40, "device_baseline": on_device}
    with Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, layout=LAYOUT, **options) as publisher:
        if rank == 0:
            subscribers = [
                Subscriber(shards[i], publisher.url, shard=i, timeout=40) for i in range(2)
            ]
        for version in range(3):
            if optimizer is not None:
                train(model, optimizer, version)
            else:
                with torch.no_grad():
                    for p in model.parameters():
                        p.to_local().mul_(1.01)  # replicas stay equal
            report = publisher.publish(version)
            full = whole(model)
            for i, subscriber in enumerate(subscribers):
                got = subscriber.update(at_least=version)
                assert got is not None
                assert got.full == (version == 0)
                assert got.dense_bytes < report.dense_bytes
                assert equal(shards[i], expected(full, i)), (version, i)
                assert subscriber.audit()
                sent += got.changed
        assert (publisher._device.copied_bytes > 0) == on_device
        assert publisher._owner.encoder.choice._here == 2  # every rank knows its receivers
        for subscriber in subscribers:
            subscriber.close()
    return sent


@pytest.mark.parametrize(
    ("kind", "world"), [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("fsdp+tp", 4)]
)
def test_a_trainer_of_any_layout_reaches_shards_of_another(kind: str, world: int) -> None:
    results = run_ranks(world, follow, kind, timeout=90)
    assert results[0] > 0


def resized(rank: int, world: int, state: dict | None, weights: dict, other: bool) -> dict:
    """A trainer's life: resumes from whole weights and the chain's state, publishes once more."""
    torch.manual_seed(1)
    model = Attention()
    model.load_state_dict(weights)
    if world > 1:
        fully_shard(model)
    there = rollout(Attention())
    subscriber: Any = None
    with Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, timeout=40) as publisher:
        result: dict = {}
        if state is None:
            publisher.publish(1)
            result["state"] = publisher.state_dict()
        else:
            publisher.load_state_dict(state["state"])
            assert publisher.version == 1
        result["digest"] = publisher._digest
        if rank == 0:
            subscriber = Subscriber(there, publisher.url, timeout=40)
            if state is None:
                subscriber.update()
            else:
                there.load_state_dict(state["there"])
                # What the rollout's own process would still have.
                from planaria.rl_sync.diff.digest import Digest

                subscriber._version = 1
                subscriber._digest = Digest(int(state["digest"][0], 16))
        with torch.no_grad():
            for p in model.parameters():
                local = p.to_local() if isinstance(p, DTensor) else p
                local[..., :1] += 0.01
        if state is not None:
            publisher.publish(2)
        full = whole(model)
        if rank == 0:
            if state is not None:
                report = subscriber.update(at_least=2)
                assert report is not None
                assert (report.base_version, report.full) == (1, False)
                assert equal(dict(there.state_dict()), {k: v.to(BF16) for k, v in full.items()})
                assert subscriber.audit()
            result["there"] = {k: v.clone() for k, v in there.state_dict().items()}
            subscriber.close()
    return result


def test_the_trainer_changes_its_world_size_without_a_dense_version() -> None:
    torch.manual_seed(0)
    weights = Attention().state_dict()
    before = run_ranks(2, resized, 2, None, weights, False, timeout=90)[0]
    for world in (1, 3):
        after = run_ranks(world, resized, world, before, weights, False, timeout=90)
        assert after[0]["digest"] == before["digest"]


def failing(rank: int) -> str:
    model: Any = fully_shard(trainer_on_any_rank())
    spec = "raise=boom@rl.publish.scan:rank=1"
    with Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, timeout=30) as publisher:
        publisher.publish(0)
        said = ""
        with points.armed(spec):
            try:
                publisher.publish(1)
            except Exception as error:
                said = str(error)
        publisher.publish(1)  # the same version again: the refusal was of the attempt before
        publisher.publish(2)
        assert publisher.version == 2
    return said


def trainer_on_any_rank() -> Tied:
    return trainer(seed=3)


def test_a_version_that_one_rank_could_not_prepare_is_published_by_none() -> None:
    said = run_ranks(2, failing, timeout=60)
    assert "trainer rank 1: boom" in said[0]
    assert "boom" in said[1]


def silent(rank: int, leaves: bool) -> str:
    model: Any = fully_shard(trainer_on_any_rank())
    said = ""
    with Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, timeout=30) as publisher:
        publisher.publish(0)
        if rank == 0:
            try:
                publisher.publish(1, timeout=25 if leaves else 1)
            except (SyncError, TimeoutError) as error:
                said = str(error)
        if not leaves:
            dist.barrier()
    return said


def test_a_rank_that_says_nothing_is_named_in_time() -> None:
    assert "trainer ranks [1] to prepare version 1" in run_ranks(2, silent, False, timeout=60)[0]


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    assert "trainer rank 1 is gone" in run_ranks(2, silent, True, timeout=60)[0]


def ahead(rank: int) -> list[int]:
    """A rollout that waits decodes both ranks' blocks before the version is decided on."""
    model: Any = fully_shard(trainer_on_any_rank())
    there = rollout(trainer_on_any_rank())
    found: list[int] = []
    with Publisher(
        model, "tcp://127.0.0.1:0", dtype=BF16, block_elements=400, threads=1, timeout=40
    ) as publisher, ThreadPoolExecutor(1) as pool:  # fmt: skip
        publisher.publish(0)
        if rank:
            train_by_itself(model)
            publisher.publish(1)
            whole(model)
            return found
        with Subscriber(there, publisher.url, timeout=40) as subscriber:
            subscriber.update()
            owners: set[int] = set()
            both = threading.Event()
            take = ReadAhead.take

            def taken(self: ReadAhead, piece: Any, tensors: Any) -> None:
                take(self, piece, tensors)
                owners.update(publisher.plan.owners[e.block] for e in piece.entries)
                if owners == {0, 1}:
                    both.set()

            ReadAhead.take = taken  # type: ignore[method-assign]
            result = pool.submit(subscriber.update, 1)
            train_by_itself(model)
            with points.armed(callbacks={"rl.publish.commit": lambda *_: both.wait(30)}):
                published = publisher.publish(1)
            report = result.result(40)
            assert report is not None
            assert equal({k: v.to(BF16) for k, v in whole(model).items()}, dict(there.state_dict()))
            found += [len(owners), report.ahead_bytes, report.bytes, published.bytes]
    return found


def train_by_itself(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            assert isinstance(p, DTensor)
            p.to_local().mul_(1.01)


def test_the_parts_of_all_ranks_are_decoded_before_the_version_is_decided_on() -> None:
    owners, early, came, published = run_ranks(2, ahead, timeout=90)[0]
    assert owners == 2
    assert 0 < early < came == published


# Layouts without several ranks.


def test_pad_and_split() -> None:
    model: Any = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.qkv = nn.Linear(4, 6, bias=False)
    layout = RolloutLayout(
        [Pad("embed.weight", (8, 4), fill=1.5), Split("qkv.weight", {"q": 2, "k": 4})],
        shards=2, cuts={"embed.*": 0},
    )  # fmt: skip
    there = {"embed.weight": torch.zeros(4, 4, dtype=BF16), "q": torch.zeros(2, 4, dtype=BF16),
             "k": torch.zeros(4, 4, dtype=BF16)}  # fmt: skip
    with (
        Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, layout=layout) as publisher,
        Subscriber(there, publisher.url, shard=1) as subscriber,
    ):
        for version in range(2):
            nudge(model, version, share=1.0)
            publisher.publish(version)
            subscriber.update()
        e = torch.cat([model.embed.weight.to(BF16), torch.full((3, 4), 1.5, dtype=BF16)])
        assert torch.equal(there["embed.weight"], e[4:])
        assert torch.equal(there["q"], model.qkv.weight[:2].to(BF16))
        assert torch.equal(there["k"], model.qkv.weight[2:].to(BF16))


@pytest.mark.parametrize("here_tied", [True, False])
@pytest.mark.parametrize("rename", [True, False])
def test_tied_weights(here_tied: bool, rename: bool) -> None:
    model = trainer()
    there = rollout(model)
    assert isinstance(there, Tied)
    if not here_tied:
        there.head.weight = nn.Parameter(torch.zeros_like(there.head.weight))
    layout = RolloutLayout([Rename("norm.*", "ln.*")] if rename else [])
    if rename:
        there.ln = there.norm
        del there.norm
    with (
        Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, layout=layout) as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        for version in range(2):
            nudge(model, version)
            publisher.publish(version)
            subscriber.update()
        assert torch.equal(there.embed.weight, model.embed.weight.to(BF16))
        assert torch.equal(there.head.weight, model.embed.weight.to(BF16))
        once = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        assert publisher.table.dense_bytes() == 2 * once  # the tied matrix goes over once


def test_tied_here_and_not_there_is_refused() -> None:
    model = trainer()
    there = rollout(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with (
        Publisher(model, "tcp://127.0.0.1:0", dtype=BF16) as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        publisher.publish(0)
        with pytest.raises(MismatchError, match="same memory here"):
            subscriber.update()


def test_wrappers_leave_no_trace_in_names() -> None:
    model = trainer()
    there: Any = torch.compile(rollout(model))
    compiled: Any = torch.compile(model)
    with (
        Publisher(compiled, "tcp://127.0.0.1:0", dtype=BF16) as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        publisher.publish(0)
        subscriber.update()
        assert torch.equal(there._orig_mod.embed.weight, model.embed.weight.to(BF16))


def test_layouts_are_checked() -> None:
    model = trainer()
    with pytest.raises(ConfigError, match="matches no tensor"):
        Publisher(model, "tcp://127.0.0.1:0", layout=RolloutLayout([Rename("nope", "x")]))
    with pytest.raises(ConfigError, match="no dimension 7"):
        Publisher(model, "tcp://127.0.0.1:0", layout=RolloutLayout((), 2, {"embed.*": 7}))
    with pytest.raises(ConfigError, match="at least one shard"):
        RolloutLayout((), 0)
