"""A session: a training loop that loses ranks or gains them and goes on with the same numbers.

::

    with Session(model, optim, data, steps=1000, scheduler=sched, clip_grad_norm=1.0) as session:
        for step in session:
            with step:
                for batch in step.micro_batches():
                    step.backward(model(**batch).loss)
            if step.committed:
                log(step.number, step.metrics)
"""

import hashlib
import inspect
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import planaria
from planaria.core.deadline import Deadline
from planaria.data import GlobalBatch
from planaria.elastic.boundary import Boundary
from planaria.elastic.buffers import (
    BufferGuard,
    FrozenGuard,
    refuse_running_statistics,
    refuse_wrappers,
    trained_parameters,
)
from planaria.elastic.engine import Engine, Settings
from planaria.elastic.grace import Meter
from planaria.elastic.journal import Journal
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.partition.blocks import ELEMENTWISE
from planaria.elastic.preemption import Notices
from planaria.elastic.reduction.reducer import Consistency
from planaria.elastic.replicated import Replicated
from planaria.elastic.saving import Saving
from planaria.elastic.scale import LossScale
from planaria.elastic.step import Step
from planaria.elastic.stored import BlockProvider
from planaria.elastic.updates import BlockUpdater, ReplicaUpdater
from planaria.elastic.user_state import UserState
from planaria.errors import (
    CollectiveError,
    ConfigError,
    DeadlineError,
    NotSupportedError,
    StateError,
    StoppedError,
)

if TYPE_CHECKING:
    import torch

    from planaria.checkpoint import Checkpointer


logger = logging.getLogger(__name__)


class Session:
    """Training that goes on when ranks are lost or gained, with the numbers that it would have had.

    Every rank runs the same loop. A step whose ranks were not all there to the end is yielded
    again (`step.committed` is false, the next one's `attempt` is higher), or counts where any rank
    saw that all were able to apply it. What the loop prints or keeps after `step.committed` is the
    same as in a run where nothing happened. With ``zero_stage`` 1 or 2 the optimizer works on
    copies: what the loop writes to parameters by itself is overwritten by the next step.

    Args:
        model: A plain module, compiled or not; every rank has a copy of it. Parameters that are
            frozen now must stay so; others may be frozen for a while.
        optimizer: Any torch optimizer over its parameters. With ``zero_stage`` 1 or 2 its state
            lives in blocks on their owners, and it is not stepped itself.
        data: The global batch; its micro-batches are shared among the ranks.
        steps: Steps of the whole run; by default those of `data`.
        scheduler: A learning rate scheduler, stepped after every step that was applied.
        state: Further objects by name that all ranks have alike, and that a rank that joins is
            brought: with state_dict and load_state_dict, or dicts, lists and tensors changed in
            place. Where a step is repeated they are put back to what they were at its begin;
            those of more than 1 MB have to be changed once `step.committed` instead.
        clip_grad_norm: The norm that the gradient over all parameters is scaled down to.
        checkpointer: Made with ``process_group=LATER`` (under an elastic agent that is the
            default). The session says what is saved: the model, the optimizer, the scheduler, the
            data's position and `state`; it restores the newest step when it is entered, saves when
            the checkpointer's policy says so, and goes back to a saved step where more ranks were
            lost than `redundancy` allows.
        consistency: "bitwise": the numbers do not depend on the number of ranks; or "fast".
        zero_stage: 0: every rank steps the user's own optimizer over the whole gradient. 1: the
            optimizer's state is spread over ranks. 2: the gradient, too.
        redundancy: Ranks that may be lost within one step without going back to an earlier one:
            as many others keep each block of the optimizer's state. With ``zero_stage=0`` all do.
        group: Micro-batches of a leaf of the gradient's sum, added from left to right. It is part
            of what fixes the bits.
        seed: Seed of what is random in the model, such as dropout.
        loss_scale: "dynamic" or a number for float16 models: the loss is multiplied with it.
        skip_nonfinite: Whether a step whose gradient is infinite or not a number is left out; by
            default with a loss scale.
        uncut: Parameters, by name, whose optimizer looks at the whole tensor.
        membership: This rank's place in the job; by default found in the environment.
        facts: What else must be equal on all ranks, of JSON values; a rank that differs is refused.
        record: A file, on a disk that all ranks share, for the record of the run: every committed
            step, every change of members (see `planaria.elastic.record`).
        notices: Where this rank hears that it has to go (see `planaria.elastic.preemption`); opened
            by the caller. Its blocks are handed over at the next step boundary, and its loop ends.
            If all have to go the run stops, and is saved.
        recovery_s: Seconds for a change of members: detection, agreement, recovery.
        step_timeout_s: Seconds that ranks wait for each other in a step.
        links: What the tensors of a model on a CUDA device go by: "host", copied to the host and
            over gloo, any number of ranks a device; or "nccl", one rank a device.

    Attributes:
        model: The model.
        stopped: Whether the loop ended before `steps`, because that was asked for.

    Raises:
        ConfigError: The arguments do not fit each other.
        NotSupportedError: The model or the optimizer cannot be used in a session; says why.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        optimizer: "torch.optim.Optimizer",
        data: GlobalBatch,
        *,
        steps: int | None = None,
        scheduler: Any = None,
        state: Mapping[str, Any] | None = None,
        clip_grad_norm: float | None = None,
        checkpointer: "Checkpointer | None" = None,
        consistency: Consistency = "bitwise",
        zero_stage: int = 2,
        redundancy: int = 1,
        group: int = 1,
        seed: int = 0,
        loss_scale: float | str | None = None,
        skip_nonfinite: bool | None = None,
        uncut: "tuple[str, ...] | None" = None,
        membership: Membership | None = None,
        facts: Mapping[str, Any] | None = None,
        record: "str | os.PathLike[str] | None" = None,
        notices: Notices | None = None,
        recovery_s: float = 60.0,
        step_timeout_s: float = 600.0,
        links: Literal["host", "nccl"] = "host",
    ) -> None:
        total = data.total_steps if steps is None else steps
        if total is None or total < 0:
            raise ConfigError("how many steps? Give steps=, or bound the data")
        if zero_stage not in (0, 1, 2):
            raise ConfigError(f"zero_stage={zero_stage!r}: choose 0, 1 or 2")
        if redundancy < 0:
            raise ConfigError(f"redundancy={redundancy}: give the losses to survive, 0 or more")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ConfigError(f"clip_grad_norm={clip_grad_norm!r}: give a norm above 0, or None")
        if clip_grad_norm == math.inf:
            clip_grad_norm = None  # the same bits, and a number that JSON has
        if missing := _needs(scheduler):
            raise NotSupportedError(
                f"{type(scheduler).__name__}.step() needs {missing}, which a session does not give "
                "it: step it in the loop once step.committed, and name it in state="
            )
        if links not in ("host", "nccl"):
            raise ConfigError(f"links={links!r}: choose 'host' or 'nccl'")
        if links == "nccl" and not any(p.is_cuda for p in model.parameters()):
            raise ConfigError("links='nccl' needs a model on a CUDA device")
        if type(optimizer).__name__ == "LBFGS":
            raise NotSupportedError("LBFGS evaluates the loss by itself: use another optimizer")
        refuse_wrappers(model)
        refuse_running_statistics(model)
        self.model, self.data, self.seed, self.steps = model, data, seed, total
        self.stopped = False
        self.scale = None if loss_scale is None else LossScale(loss_scale)
        self.buffers, self.frozen = BufferGuard(model), FrozenGuard(model)
        self.user_state = UserState(state or {})
        parameters = trained_parameters(model)
        if zero_stage == 0:
            updater = ReplicaUpdater(parameters, optimizer)
        else:
            if uncut is None:
                uncut = () if type(optimizer).__name__ in ELEMENTWISE else tuple(parameters)
            updater = BlockUpdater(
                parameters, optimizer, redundancy, whole=zero_stage == 1, uncut=uncut
            )
        own: dict[str, Any] = {"data": data}
        own |= {} if scheduler is None else {"scheduler": scheduler}
        own |= {} if self.scale is None else {"loss_scale": self.scale}
        if taken := set(own) & set(state or ()):
            raise ConfigError(f"state: the session has parts named {sorted(taken)} of its own")
        settings = Settings(
            micro_batches=data.n_micro_batches,
            group=group,
            consistency=consistency,
            clip_grad_norm=clip_grad_norm,
            skip_nonfinite=loss_scale is not None if skip_nonfinite is None else skip_nonfinite,
            recovery_s=recovery_s,
            step_timeout_s=step_timeout_s,
            links=links,
        )
        replicated = Replicated(model, optimizer, {**own, **(state or {})}, whole=updater.carried)
        self._facts = _facts(model, parameters, optimizer, data, settings, {
            "steps": total, "zero_stage": zero_stage, "redundancy": redundancy, "seed": seed,
            "loss_scale": loss_scale, **(facts or {}),
        })  # fmt: skip
        for name, fact in self._facts.items():
            if not _is_json(fact):
                raise ConfigError(f"facts[{name!r}] is {fact!r}, which JSON cannot hold")
        self._membership = _connect() if membership is None else membership
        saving, meter = None, Meter()
        if checkpointer is not None:
            optim = optimizer
            if isinstance(updater, BlockUpdater):
                optim = BlockProvider("optim", updater, optimizer, parameters)
            kept = {"sched" if name == "scheduler" else name: part for name, part in own.items()}
            saved = {"model": model, "optim": optim, **kept, **(state or {})}
            saving = Saving(checkpointer, saved, meter)
        self._checkpointer = checkpointer
        self._engine = Engine(
            self._membership,
            parameters,
            updater,
            replicated,
            scheduler,
            self.scale,
            settings,
            saving,
            None if record is None else Journal(record, seed),
            notices,
            meter,
        )
        self._boundary = Boundary(self._engine)
        self._attempts: dict[int, int] = {}
        self._stop = self._entered = self._over = False

    @property
    def view(self) -> View:
        """The generation: who takes part, and which rank this is."""
        return self._engine.view

    @property
    def step(self) -> int:
        """The number of steps that are committed."""
        return self._engine.step

    @property
    def left(self) -> bool:
        """Whether this member has handed over and gone, while the others go on."""
        return self._boundary.left

    def request_stop(self) -> None:
        """Asks all ranks to end the loop after the step under way."""
        self._stop = True

    def __enter__(self) -> Self:
        if self._entered:
            raise ConfigError("a session is entered once: make another one for another run")
        try:
            view = self._membership.join(self._facts, Deadline(self._engine.join_timeout_s))
            self._engine.generations.start(view)
        except BaseException:
            self._engine.drop_groups()
            self._membership.close()
            raise
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._entered and not self._over:
            logger.warning(
                "the loop was left after step %d of %d, and that is not saved by itself: end it "
                "with session.request_stop(), on any rank",
                self._engine.step,
                self.steps,
            )
        try:
            if kind is None and self._checkpointer is not None:
                # All is durable: who is lost by now is not missed.
                with suppress(CollectiveError):
                    self._checkpointer.close()
            if kind is None and self._entered and not self._boundary.left:
                complete = self._engine.step >= self.steps
                deadline = Deadline(self._engine.join_timeout_s)
                self._membership.finish(deadline, complete=complete)
        finally:
            # A rank alone has nobody to wait for: what it began to save it brings to its end.
            self._engine.drop_groups(saves=self._engine.view.world_size > 1)
            if self._engine.journal is not None:
                self._engine.journal.close()
            self.data.close()
            self._membership.close()

    def __iter__(self) -> Iterator[Step]:
        """Yields the steps from where the run stands, some of them again."""
        if not self._entered:
            raise ConfigError("a session is entered first: with Session(...) as session")
        while self._next_is_due():
            number = self._engine.step
            self.data.step = number
            attempt = self._attempts.get(number, 0)
            self._attempts = {number: attempt + 1}
            step = Step(self, self._engine, number, attempt)  # pyright: ignore[reportArgumentType]
            yield step
            if step.open:
                raise ConfigError(f"step {number} was not carried out: put it into `with step:`")
            if step.failed:
                self._go_on_after(step)

    def _go_on_after(self, step: Step) -> None:
        """The loop has caught an error in a step, such as one of memory, and wants to go on.

        Raises:
            StateError: The step counts, and this rank has applied only some of it.
        """
        engine = self._engine
        if engine.halfway:
            raise StateError(
                f"step {step.number} was committed, and an error ended it here while it was "
                f"applied ({step.failed}): what this rank has is of no use. Let the process end; "
                "the others go on without it, and a replacement gets its state from them"
            )
        if engine.step == step.number:
            self.user_state.put_back()
        if engine.step > step.number or engine.reducer.spoiled:
            # Others have parts of its sum, or wait for more of it: they begin the step again, too.
            why = f"step {step.number} was ended by an error of the loop ({step.failed})"
            engine.generations.recover(CollectiveError(why))

    def _next_is_due(self) -> bool:
        """Does what there is to do between steps; whether there is a further one."""
        if not self._engine.generations.settled:
            # The loop has caught what ended a recovery: nothing is computed before one has ended.
            self._engine.generations.recover(CollectiveError("a recovery was ended by an error"))
        while True:
            engine = self._engine
            stop = engine.decision is not None and engine.decision.stop
            self.data.step = engine.step
            try:
                if self._boundary.cross(ended=stop or engine.step >= self.steps):
                    return True
                self._over, self.stopped = True, engine.step < self.steps
                break
            except (CollectiveError, DeadlineError) as error:
                engine.generations.recover(error)
        if engine.view.last and not self.left and engine.step < self.steps:
            # Too few are left to go on, and what they had is saved.
            if engine.saving is not None:
                engine.saving.close()
            self._membership.finish(Deadline(engine.join_timeout_s))
            raise StoppedError(engine.view.last)
        return False


def _needs(scheduler: Any) -> str:
    """What `scheduler.step` has to be given, such as the metric of `ReduceLROnPlateau`."""
    if scheduler is None:
        return ""
    asked = inspect.signature(scheduler.step).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return ", ".join(p.name for p in asked if p.kind in kinds and p.default is p.empty)


def _connect() -> Membership:
    from planaria.elastic.membership import connect

    return connect()


def _facts(
    model: "torch.nn.Module",
    parameters: "Mapping[str, torch.Tensor]",
    optimizer: "torch.optim.Optimizer",
    data: GlobalBatch,
    settings: Settings,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What fixes the bits of a run, and must be equal on all ranks."""
    import torch

    # With wrappers' prefixes: a model that is compiled on some ranks alone is another one.
    shapes = [[name, list(p.shape), str(p.dtype)] for name, p in model.named_parameters()
              if p.requires_grad]  # fmt: skip
    groups = [[n for n, p in parameters.items() if any(p is q for q in group["params"])]
              for group in optimizer.param_groups]  # fmt: skip
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    return {
        "planaria": f"{planaria.__version__}, code {code_digest(Path(__file__).parent)}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "model": _digest(shapes),
        "optimizer": type(optimizer).__name__,
        "groups": _digest(groups),
        "data": _digest(data.state_dict()["order"]),
        "micro_batches": settings.micro_batches,
        "group": settings.group,
        "consistency": settings.consistency,
        "clip_grad_norm": settings.clip_grad_norm,
        "skip_nonfinite": settings.skip_nonfinite,
        **more,
    }


def code_digest(folder: Path) -> str:
    """Of a folder's sources: each rank plans for itself what all of them have to plan alike.

    Of two installations with the same version one may have been changed since.
    """
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
