"""Small trainings in every parallel form, and their whole state as digests that can be compared.

A `Job` says what is trained; `train_and_save` runs it without a break and saves on the way,
`restore_and_train` restores what some job saved, perhaps into another form, and goes on.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from planaria.checkpoint import Checkpointer

SAVED_AT, STEPS = 2, 4
TIMEOUT_S = 60.0

# Tensor parallelism wants a hidden size that its ranks divide; nothing else divides anything.
TOKENS, WIDTH, HIDDEN = 7, 13, 20


class Factored(Optimizer):
    """Keeps a row's and a column's mean of the squared gradient, as Adafactor does.

    torch's own Adafactor does not run on sharded parameters.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See `Optimizer.step`."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                square = p.grad.square() + 1e-8
                slots, scale = self.state[p], torch.ones_like(p)
                for dim in range(p.dim()):
                    mean = _like(square, square.mean(dim, keepdim=True), partial_too=False)
                    old = slots.get(f"over_{dim}", mean)
                    slots[f"over_{dim}"] = old.lerp(mean, 0.1)
                    scale = scale * slots[f"over_{dim}"]
                p.sub_(_like(p, group["lr"] * p.grad * scale.rsqrt()))


def _like(param: torch.Tensor, value: torch.Tensor, *, partial_too: bool = True) -> torch.Tensor:
    """The value placed as the parameter, or only with its partial sums made whole."""
    if not isinstance(value, DTensor) or not isinstance(param, DTensor):
        return value
    places = [Replicate() if p.is_partial() else p for p in value.placements]
    return value.redistribute(placements=param.placements if partial_too else places)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "factored": Factored,
}
#: What wrappers put into the names of parameters.
_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")


class Net(nn.Module):
    """Sizes that most numbers of ranks do not divide, one of them smaller than any world."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, TOKENS] of tokens [batch]."""
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))) * self.scale)


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Attributes:
        form: "plain", "ddp", or a kind of sharding with its mesh: "fsdp:4", "hsdp:2x2", "tp:4",
            "fsdp_tp:2x2".
        optimizer: A key of `OPTIMIZERS`.
        model: "whole", "tied" or "frozen" (a part of it).
        policy: "", or of FSDP "bf16" (mixed precision) or "offload" (parameters on the host), or
            what is around its modules: "recomputed" (activation checkpointing) or "compiled".
        evaluate: Whether an evaluation comes just before the save.
    """

    form: str
    optimizer: str = "adamw"
    model: str = "whole"
    policy: str = ""
    evaluate: bool = False

    @property
    def folder(self) -> str:
        parts = [self.form, self.optimizer, self.model, self.policy, "eval" * self.evaluate]
        return "-".join(p for p in parts if p).replace(":", "_")

    @property
    def world(self) -> int:
        _, _, mesh = self.form.partition(":")
        return math.prod(map(int, mesh.split("x"))) if mesh else 1


@dataclass(frozen=True)
class Outcome:
    """What came of a training, on one rank.

    Attributes:
        state: Digest of every whole tensor when it was saved, or after it was restored.
        losses: Of the steps after that.
        final: Digest of every whole tensor at the end.
        skipped: What the restore reported as left out.
    """

    state: dict[str, str]
    losses: list[float]
    final: dict[str, str]
    skipped: dict[str, str]


def train_and_save(rank: int, root: Path, jobs: list[Job]) -> dict[Job, Outcome]:
    """Trains each job for `STEPS` steps, saving after `SAVED_AT`."""
    return {job: _named(job, _train_and_save, root, job) for job in jobs}


def restore_and_train(
    rank: int, root: Path, pairs: list[tuple[Job, Job]]
) -> dict[tuple[Job, Job], Outcome]:
    """For each (saved job, job), restores the one into the other and trains it to its end."""
    return {(saved, job): _named(job, _restore_and_train, root, saved, job) for saved, job in pairs}


def _named(job: Job, call: Callable[..., Outcome], *args: Any) -> Outcome:
    try:
        return call(*args)
    except Exception as error:
        error.add_note(f"in {job}, {args}")
        raise


def _train_and_save(root: Path, job: Job) -> Outcome:
    model, optim = build(job)
    with checkpointer(root / job.folder, {"model": model, "optim": optim}) as ckpt:
        for step in range(SAVED_AT):
            train_step(job, model, optim, step)
        state = whole_state(model, optim)
        if job.evaluate:
            model.eval()
            with torch.no_grad():
                model(_batch(job, SAVED_AT))
            model.train()
        ckpt.save(SAVED_AT)
        losses = [train_step(job, model, optim, step) for step in range(SAVED_AT, STEPS)]
    return Outcome(state, losses, whole_state(model, optim), {})


def _restore_and_train(root: Path, saved: Job, job: Job) -> Outcome:
    model, optim = build(job)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with checkpointer(root / saved.folder, {"model": model, "optim": optim}) as ckpt:
        report = ckpt.restore()
    assert report is not None
    assert report.step == SAVED_AT
    state = whole_state(model, optim)
    losses = [train_step(job, model, optim, step) for step in range(SAVED_AT, STEPS)]
    return Outcome(state, losses, whole_state(model, optim), report.skipped)


def checkpointer(path: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    """A checkpointer that checks every byte, and that no test waits for long."""
    return Checkpointer(path, state, **{"audit": True, "timeout_s": TIMEOUT_S, **options})


def build(job: Job) -> tuple[nn.Module, Optimizer]:
    """The model and optimizer of a job; its initial values are the same in every form."""
    torch.manual_seed(7)
    model: nn.Module = Net(tied=job.model == "tied")
    if job.model == "frozen":
        for parameter in (*model.up.parameters(), model.scale):
            parameter.requires_grad_(False)
    kind, _, shape = job.form.partition(":")
    if kind == "ddp":
        # DDP packs its buckets anew after the first step, and with them the order of the sum over
        # more than two ranks: a run that was stopped would differ by itself. Not with this option.
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif kind != "plain":
        _shard(model, kind, _mesh(kind, shape), job.policy)
        if job.policy == "compiled":
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, OPTIMIZERS[job.optimizer](trained)


def _mesh(kind: str, shape: str) -> DeviceMesh:
    names = {"fsdp": ("dp",), "tp": ("tp",), "hsdp": ("replica", "dp"), "fsdp_tp": ("dp", "tp")}
    return init_device_mesh(
        "cpu", tuple(map(int, shape.split("x"))), mesh_dim_names=names[kind.removesuffix("_only")]
    )


def _shard(model: nn.Module, kind: str, mesh: DeviceMesh, policy: str) -> None:
    if "tp" in kind:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        if kind == "tp":
            return
        mesh = mesh["dp"]
    options: dict[str, Any] = {"mesh": mesh}
    if policy == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    elif policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if policy == "recomputed":
        model.up = checkpoint_wrapper(model.get_submodule("up"))
    for part in (model.get_submodule("up"), model.get_submodule("down")):
        fully_shard(part, **options)
    fully_shard(model, **options)


def _batch(job: Job, step: int) -> torch.Tensor:
    """Tokens [8] of this rank and step; the ranks of one tensor-parallel group share theirs."""
    kind, _, shape = job.form.partition(":")
    rank = dist.get_rank() if dist.is_initialized() and kind != "plain" else 0
    if kind == "tp":
        rank = 0
    elif kind == "fsdp_tp":
        rank //= int(shape.split("x")[1])
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(TOKENS, (8,), generator=generator)


def train_step(job: Job, model: nn.Module, optim: Optimizer, step: int) -> float:
    """One step; returns this rank's loss."""
    tokens = _batch(job, step)
    optim.zero_grad()
    loss = cross_entropy(model(tokens).float(), (tokens + 1) % TOKENS)
    loss.backward()
    optim.step()
    return loss.item()


def whole_state(model: nn.Module, optim: Optimizer | None = None) -> dict[str, str]:
    """Digests of all parameters, buffers and optimizer slots as whole tensors, by their names.

    It asks torch alone: no way through what is tested here.
    """
    found: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        for prefix in _PREFIXES:
            name = name.replace(prefix, "")
        names.setdefault(id(tensor), name)
        found[f"model.{name}"] = tensor
    for group in optim.param_groups if optim else ():
        for parameter in group["params"]:
            for slot, value in optim.state.get(parameter, {}).items() if optim else ():
                found[f"optim.{names[id(parameter)]}.{slot}"] = value
    return {name: digest(whole(tensor)) for name, tensor in found.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all of its data on this rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor: torch.Tensor) -> str:
    """What two tensors share if and only if they are equal bit for bit."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
