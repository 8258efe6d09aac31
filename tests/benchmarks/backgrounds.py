"""Planaria and its peers saving training state while training goes on.

Each with the best settings its documents name. A library that is not installed, or does not run
here, raises `NotMeasured` when it is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from limits import remove
from peers import torch_checkpointing, torchsnapshot
from timing import NotMeasured
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils._pytree import tree_map_only

from planaria.checkpoint import Checkpointer, open_checkpoint


class Pending(ABC):
    """A save in the background."""

    @abstractmethod
    def gate(self) -> None:
        """Returns once the state may be changed."""

    @abstractmethod
    def durable(self) -> None:
        """Returns once it is on disk, as far as the library itself sees to it."""


class _Pending(Pending):
    def __init__(self, gate: Callable[[], Any], durable: Callable[[], Any]) -> None:
        self._gate, self._durable = gate, durable

    def gate(self) -> None:
        self._gate()

    def durable(self) -> None:
        self._durable()


class Background(ABC):
    """Saves the state of a training while it goes on.

    Args:
        model: The model.
        optim: Its optimizer, whose state is there already.
        folder: Where checkpoints go; all ranks have the same.
        group: A group of its own for a library that needs one; None without ranks.
    """

    name: str
    settings: str
    #: Whether it is for the job as a whole, so that several ranks can use it.
    any_ranks = True

    def __init__(
        self, model: nn.Module, optim: torch.optim.Optimizer, folder: Path, group: Any
    ) -> None:
        self.model, self.optim, self.folder, self.group = model, optim, folder, group

    def state_dict(self) -> dict[str, Any]:
        """What a library that wants a state dict is given."""
        return {"model": self.model.state_dict(), "optim": self.optim.state_dict()["state"]}

    @abstractmethod
    def start(self, step: int, state: dict[str, Any]) -> Pending:
        """Begins a save of a state dict; returns when training may go on."""

    @abstractmethod
    def read(self, step: int) -> dict[str, torch.Tensor]:
        """The model's parameters and ``exp_avg_sq`` as they were saved, by name."""

    def path(self, step: int) -> Path:
        """Where a step goes: two places, in turn."""
        return self.folder / f"{type(self).__name__}-{step % 2}"

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what it started."""

    def expected(self) -> dict[str, torch.Tensor]:
        """A copy of what `read` should give for a save of now."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {}
        for parameter, slots in self.optim.state.items():
            name = names[id(parameter)]
            found[name] = parameter.detach().clone()
            found[f"{name}.exp_avg_sq"] = slots["exp_avg_sq"].clone()
        return found

    def _from_state_dict(self, stored: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for i, (name, _) in enumerate(self.model.named_parameters()):
            result[name] = stored["model"][name]
            result[f"{name}.exp_avg_sq"] = stored["optim"][i]["exp_avg_sq"]
        return result

    def _empty(self) -> dict[str, Any]:
        return tree_map_only(torch.Tensor, torch.zeros_like, self.state_dict())


class PlanariaBackground(Background):
    name = "planaria"
    settings = "keep=1, a pool that holds the state"

    def __init__(
        self,
        model: nn.Module,
        optim: torch.optim.Optimizer,
        folder: Path,
        group: Any,
        pool_bytes: int | None = None,
    ) -> None:
        super().__init__(model, optim, folder, group)
        self.root = folder / f"planaria-{pool_bytes}"
        state = {"model": model, "optim": optim}
        self.checkpointer = Checkpointer(self.root, state, keep=1, pool_bytes=pool_bytes)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def start(self, step: int, state: dict[str, Any]) -> Pending:
        handle = self.checkpointer.save(step)
        return _Pending(self.checkpointer.before_update, handle.wait_committed)

    def read(self, step: int) -> dict[str, torch.Tensor]:
        stored = open_checkpoint(self.root)
        if stored.step != step or stored.verify():
            raise NotMeasured(f"step {step} does not verify")
        result: dict[str, torch.Tensor] = {}
        for name, _ in self.model.named_parameters():
            logical = name.removeprefix("module.")
            result[name] = stored.read(f"model.{logical}")
            result[f"{name}.exp_avg_sq"] = stored.read(f"optim.{logical}.exp_avg_sq")
        return result

    def close(self) -> None:
        self.checkpointer.close()


class DcpAsync(Background):
    """Its own stager in each call: copies into fresh memory before it returns."""

    name = "dcp.async_save"
    settings = "defaults: thread, a new DefaultStager in each call"
    stager: DefaultStager | None = None

    def start(self, step: int, state: dict[str, Any]) -> Pending:
        response: Any = dcp.async_save(
            state,
            storage_writer=dcp.FileSystemWriter(self.path(step)),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            async_stager=self.stager,
            process_group=self.group,
            no_dist=self.group is None,
        )
        if hasattr(response, "staging_completion"):
            return _Pending(response.staging_completion.result, response.upload_completion.result)
        return _Pending(lambda: None, response.result)

    def read(self, step: int) -> dict[str, torch.Tensor]:
        target = self._empty()
        dcp.load(
            target,
            storage_reader=dcp.FileSystemReader(self.path(step)),
            process_group=self.group,
            no_dist=self.group is None,
        )
        return self._from_state_dict(target)

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpKeptStager(DcpAsync):
    """Copies before it returns, into memory that is kept."""

    name = "dcp.async_save, kept stager"
    settings = "thread; one DefaultStager for all calls, synchronous, no pinned or shared memory"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))


class DcpAsyncStaging(DcpAsync):
    """Copies in a thread, into memory that is kept; training waits for it before its update."""

    name = "dcp.async_save, async staging"
    settings = "thread; one DefaultStager for all calls, asynchronous, no pinned or shared memory"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stager = DefaultStager(StagingOptions(False, False, True, False))


class TorchsnapshotAsync(Background):
    name = "torchsnapshot.async_take"
    settings = "batching of small tensors (the default); not synced"
    any_ranks = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lib = torchsnapshot()

    def _app_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"state": self._lib.StateDict(**state)}

    def start(self, step: int, state: dict[str, Any]) -> Pending:
        remove(self.path(step))  # it must not be there
        pending = self._lib.Snapshot.async_take(str(self.path(step)), self._app_state(state))
        return _Pending(lambda: None, pending.wait)

    def read(self, step: int) -> dict[str, torch.Tensor]:
        target = self._app_state(self._empty())
        self._lib.Snapshot(str(self.path(step))).restore(target)
        return self._from_state_dict(target["state"])


class TorchCheckpointingAsync(Background):
    name = "torch_checkpointing"
    settings = (
        "asynchronous saver: staging thread, shared memory, writer process; use_direct_io=False; "
        "its lock is taken before the update; not synced"
    )
    any_ranks = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        lib = torch_checkpointing()
        staging = lib.staging.CheckpointStagerConfig(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        config = lib.checkpoint_manager.CheckpointManager.Config(
            save=lib.config.AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=lib.storage.filesystem.LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self._manager = config.build()
        self._manager.prewarm_staging(self.state_dict())

    def start(self, step: int, state: dict[str, Any]) -> Pending:
        remove(self.path(step))  # it commits onto unoccupied space only
        written = self._manager.save(str(self.path(step)), state)
        assert written is not None

        def gate() -> None:
            with self._manager.lock():
                pass

        return _Pending(gate, written.result)

    def read(self, step: int) -> dict[str, torch.Tensor]:
        target = self._empty()
        self._manager.load(str(self.path(step)), into=target)
        return self._from_state_dict(target)

    def close(self) -> None:
        self._manager.close()


BACKGROUNDS: tuple[type[Background], ...] = (
    *(PlanariaBackground, DcpAsync, DcpKeptStager, DcpAsyncStaging),
    *(TorchsnapshotAsync, TorchCheckpointingAsync),
)
