"""Planaria and its peers behind one interface, each with the best settings its documents name.

A `Library` saves and loads a `State`; for saves in the background see `backgrounds.py`. A library
that is not installed, or does not run here, raises `NotMeasured` when it is made. All saves count
until the data is durable: where a peer does not sync what it wrote, its adapter does.
"""

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from limits import sync
from states import State
from timing import NotMeasured
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from planaria.checkpoint import Checkpointer


class Library(ABC):
    """Saves a state and loads it in place.

    Args:
        state: The state.
        folder: Where its checkpoints go.
    """

    name: str
    settings: str

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder

    @abstractmethod
    def save(self, step: int) -> None:
        """Saves durably."""

    @abstractmethod
    def load(self, step: int) -> None:
        """Loads what was saved as this step, into the state's own tensors."""

    def path(self, step: int) -> Path:
        """The file or folder of a step."""
        return self.folder / f"{type(self).__name__}-{step}"

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what it started."""


class Planaria(Library):
    name = "planaria"
    settings = "defaults (a pool that holds the state); a load verifies every checksum"

    def __init__(self, state: State, folder: Path, **options: Any) -> None:
        super().__init__(state, folder)
        options = {"pool_bytes": state.nbytes + (64 << 20), **options}
        self.checkpointer = Checkpointer(folder / "planaria", {"model": state.module}, **options)

    def save(self, step: int) -> None:
        self.checkpointer.save(step).wait_committed()

    def load(self, step: int) -> None:
        self.checkpointer.restore(step)

    def path(self, step: int) -> Path:
        return self.folder / "planaria" / f"step-{step:08d}"

    def close(self) -> None:
        self.checkpointer.close()


class TorchSave(Library):
    name = "torch.save"
    settings = "then fsync; load with weights_only=True, mmap=True"

    def save(self, step: int) -> None:
        torch.save(self.state.tensors, self.path(step))
        sync(self.path(step))

    def load(self, step: int) -> None:
        stored = torch.load(self.path(step), weights_only=True, mmap=True)
        for name, tensor in self.state.tensors.items():
            tensor.copy_(stored[name])


class Dcp(Library):
    name = "dcp.save"
    settings = "FileSystemWriter(sync_files=True, the default), plan caching, no_dist"

    def save(self, step: int) -> None:
        dcp.save(
            self.state.tensors,
            storage_writer=dcp.FileSystemWriter(self.path(step)),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            no_dist=True,
        )

    def load(self, step: int) -> None:
        dcp.load(
            dict(self.state.tensors),
            storage_reader=dcp.FileSystemReader(self.path(step)),
            planner=DefaultLoadPlanner(),
            no_dist=True,
        )


class Safetensors(Library):
    name = "safetensors"
    settings = "save_file, then fsync; safe_open and a copy of each tensor"

    def save(self, step: int) -> None:
        safetensors.torch.save_file(self.state.tensors, self.path(step))
        sync(self.path(step))

    def load(self, step: int) -> None:
        with safetensors.safe_open(self.path(step), framework="pt") as file:
            for name, tensor in self.state.tensors.items():
                tensor.copy_(file.get_tensor(name))


class Torchsnapshot(Library):
    name = "torchsnapshot"
    settings = "Snapshot.take and restore, batching of small tensors (the default), then fsync"

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._lib = torchsnapshot()

    def _app_state(self) -> dict[str, Any]:
        return {"state": self._lib.StateDict(**self.state.tensors)}

    def save(self, step: int) -> None:
        self._lib.Snapshot.take(str(self.path(step)), self._app_state())
        sync(self.path(step))

    def load(self, step: int) -> None:
        app_state = self._app_state()
        self._lib.Snapshot(str(self.path(step))).restore(app_state)
        for name, tensor in self.state.tensors.items():
            if app_state["state"][name] is not tensor:
                tensor.copy_(app_state["state"][name])


class TorchCheckpointing(Library):
    name = "torch_checkpointing"
    settings = (
        "synchronous saver, use_direct_io=False, then fsync; its own layout with mmap, or "
        "safetensors for tensors below 64 kB, whichever is faster"
    )

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        lib = torch_checkpointing()
        small = state.nbytes < len(state.tensors) << 16
        config = lib.checkpoint_manager.CheckpointManager.Config(
            save=lib.config.SyncCheckpointSaverConfig(),
            items={"state": lib.schema.ItemSpec(layout=safetensors_layout(lib) if small else None)},
            storage_config=lib.storage.filesystem.LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self._manager = config.build()

    def save(self, step: int) -> None:
        self._manager.save(str(self.path(step)), {"state": self.state.tensors})
        sync(self.path(step))

    def load(self, step: int) -> None:
        self._manager.load(str(self.path(step)), into={"state": self.state.tensors})

    def close(self) -> None:
        self._manager.close()


LIBRARIES: tuple[type[Library], ...] = (
    *(Planaria, Dcp, TorchSave, Safetensors, Torchsnapshot, TorchCheckpointing),
)


def torchsnapshot() -> Any:
    """The library.

    Raises:
        NotMeasured: It is not installed, or does not run here.
    """
    with _import("torchsnapshot"):
        import torchsnapshot as lib  # pyright: ignore[reportMissingImports]

        return lib


def torch_checkpointing() -> Any:
    """The library.

    Raises:
        NotMeasured: It is not installed, or does not run here.
    """
    with _import("torch_checkpointing"):
        import torch_checkpointing as lib  # pyright: ignore[reportMissingImports]
        import torch_checkpointing.checkpoint_layout  # pyright: ignore[reportMissingImports]
        import torch_checkpointing.storage.filesystem  # pyright: ignore[reportMissingImports]

        logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
        return lib


def safetensors_layout(lib: Any) -> Any:
    """A safetensors file for a state dict: faster than its own format for small tensors."""
    layout = lib.checkpoint_layout
    return layout.LayoutInfo("state_{rank}.safetensors", layout.SafetensorsSerialization())


@contextlib.contextmanager
def _import(name: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        raise NotMeasured(
            f"{name} cannot be used here ({type(error).__name__}: {error}); "
            "pip install -c constraints.txt 'planaria[peers]'"
        ) from error


def make_all(
    kinds: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Makes libraries; those that cannot be made are told of by name.

    Args:
        kinds: Name -> makes it.
    """
    made: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, make in kinds.items():
        try:
            made[name] = make()
        except Exception as error:
            if name == "planaria":
                raise
            failures[name] = str(error).partition("\n")[0]
    return made, failures
