"""Saving and loading one state with every library, in turn, beside the limits of the machine."""

import ctypes
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import limits
import torch
from peers import LIBRARIES, Library, make_all
from states import State
from timing import Turns, clock, in_turn

RAW = "raw write + fsync"
RAW_TWO = "raw write + fsync, 2 threads"
RAW_COMMIT = "raw write, committed"
COALESCE = "raw coalesced write + fsync"


class Saves:
    """Libraries that save and load one state.

    Args:
        root: A folder to work in.
        count: How many tensors.
        numel: Elements of each.
    """

    def __init__(self, root: Path, count: int, numel: int) -> None:
        warnings.filterwarnings("ignore")  # torch tells of what its own libraries do
        self.root, self.state = root, State(count, numel)
        self.step = 0
        self.memory = limits.Memory(self.state.nbytes)
        self._parts = torch.split(self.memory.tensor[: self.state.nbytes].view(torch.float32),
                                  numel)  # fmt: skip
        kinds: dict[str, Callable[[], Library]] = {
            kind.name: partial(kind, self.state, root) for kind in LIBRARIES
        }
        self.libraries: dict[str, Library]
        self.libraries, self.failures = make_all(kinds)
        # Name -> the step it saved last, and what that was.
        self.saved: dict[str, int] = {}
        self.expected: dict[str, dict[str, torch.Tensor]] = {}

    def settings(self) -> dict[str, str]:
        """The settings of each library."""
        return {kind.name: kind.settings for kind in LIBRARIES}

    def run(self, turns: int, *, small: bool = False, only: Collection[str] = ()) -> Turns:
        """Saves with each library and with the raw writers, in turn.

        Args:
            turns: How many turns.
            small: Whether there are many small tensors: then the raw writer puts them together.
            only: Libraries that do, by default all of them.
        """
        variants: dict[str, Callable[[], float]] = {
            name: partial(self._save, library)
            for name, library in self.libraries.items()
            if not only or name in only
        }
        if small:
            variants[COALESCE] = partial(self._raw, coalesce=True)
            variants[RAW_COMMIT] = partial(self._raw, coalesce=True, commit=True)
        else:
            variants[RAW] = partial(self._raw)
            variants[RAW_TWO] = partial(self._raw, threads=2)
            variants[RAW_COMMIT] = partial(self._raw, commit=True)
            variants["memcpy"] = self.memcpy
        return in_turn(variants, turns, failures=self.failures)

    def load(
        self,
        turns: int,
        variants: Mapping[str, Callable[[], float]] | None = None,
        *,
        only: Collection[str] = (),
    ) -> Turns:
        """Loads cold with each library that has saved, in turn, and checks every load."""
        return in_turn(
            {
                name: partial(self._load, self.libraries[name])
                for name in self.saved
                if not only or name in only
            }
            | dict(variants or {}),
            turns,
            failures=self.failures,
        )

    def save_all(self) -> None:
        """One save with each library, for `load`."""
        result = in_turn(
            {name: partial(self._save, library) for name, library in self.libraries.items()},
            1,
            warm_up=0,
            failures=self.failures,
        )
        self.failures = result.failures

    def check(self, turns: Turns) -> None:
        """Loads each library's last checkpoint and compares it; who fails gives no figure."""
        for name in list(self.saved):
            if name in turns.failures:
                continue
            try:
                self._load(self.libraries[name])
            except Exception as error:
                if name == "planaria":
                    raise
                turns.drop(name, error)

    def close(self) -> None:
        """Ends all libraries."""
        for library in self.libraries.values():
            library.close()

    def _save(self, library: Library) -> float:
        before = self.saved.get(library.name)
        self.step += 1
        self.state.renew(self.step)
        seconds = clock(lambda: library.save(self.step))
        self.saved[library.name] = self.step
        self.expected[library.name] = self.state.copy()
        if before is not None:
            limits.remove(library.path(before))
        return seconds

    def load_warm(self, name: str) -> float:
        """Seconds that a load takes whose files the page cache has, as far as it can."""
        path = self.libraries[name].path(self.saved[name])
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                file.read_bytes()
        return self._load(self.libraries[name], cold=False)

    def _load(self, library: Library, *, cold: bool = True) -> float:
        step = self.saved[library.name]
        self.state.clear()
        if cold:
            limits.forget(library.path(step))
        seconds = clock(lambda: library.load(step))
        self.state.check(self.expected[library.name])
        return seconds

    def _raw(self, *, threads: int = 1, coalesce: bool = False, commit: bool = False) -> float:
        path = self.root / "raw"
        limits.remove(path)
        self.state.renew(1)
        tensors = list(self.state.tensors.values())
        manifest = b" " * (100 * len(tensors))

        def write() -> None:
            if coalesce:
                torch._foreach_copy_(self._parts, tensors)
            if commit:
                limits.commit_raw(path, self.memory, manifest)
            else:
                limits.write_raw(path, self.memory, threads=threads)

        return clock(write)

    def memcpy(self) -> float:
        """Seconds that a plain copy of as much memory takes."""
        half = self.memory.nbytes // 2 // limits.ALIGNMENT * limits.ALIGNMENT
        base = self.memory.tensor.data_ptr()
        return 2 * clock(lambda: ctypes.memmove(base + half, base, half))

    def read_raw(self, *, threads: int = 2, scatter: bool = True, direct: bool = True) -> float:
        """Seconds that it takes to read one file of the state's size, cold.

        Args:
            threads: How many read at a time.
            scatter: Whether its parts are copied into the tensors.
            direct: Whether to read past the page cache, which does not have it.
        """
        path = self.root / "raw"
        if not path.is_file() or path.stat().st_size != self.memory.nbytes:
            limits.remove(path)
            limits.write_raw(path, self.memory)
        limits.forget(path)

        def read() -> None:
            limits.read_raw(path, self.memory, threads=threads, direct=direct)
            if scatter:
                torch._foreach_copy_(list(self.state.tensors.values()), self._parts)

        return clock(read)
