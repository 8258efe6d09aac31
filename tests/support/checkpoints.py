"""What tests of checkpoints share: exact comparison of states, and saves that can be held up.

Comparison goes through torch's own `state_dict`s and the raw bits, never through the code under
test, so that a mistake there cannot hide itself.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.os_files import OsFiles
from planaria.core import points
from planaria.core.deadline import Deadline

WAIT_S = 60.0
M = TypeVar("M", bound=nn.Module)

JSON_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def signed(body: Any) -> bytes:
    """A manifest file with this body and the right digest for it."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"sha256":"' + digest + b'","manifest":' + text + b"}\n"


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all parts of JSON data."""
    found = [path] if path else []
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return found + [p for key in keys for p in places(tree[key], (*path, key))]


def bits(value: Any) -> bytes:
    """The bytes of a tensor or array in row-major order; NaN payloads and signs of zero count."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    plain = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()).reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def contents(value: Any) -> Any:
    """A value that equals another one's exactly where the two states are the same bit for bit."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, tuple(value.shape), bits(value)
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, bits(value)
    if isinstance(value, np.generic):
        return type(value).__name__, value.tobytes()
    if isinstance(value, float | complex):
        return type(value).__name__, repr(value)
    if isinstance(value, Mapping):
        return type(value).__name__, [(contents(k), contents(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [contents(v) for v in value]
    if isinstance(value, nn.Module):
        return contents(dict(value.state_dict()))
    if hasattr(value, "state_dict"):
        return contents(value.state_dict())
    return type(value).__name__, value


def randomise(module: M, seed: int) -> M:
    """Fills parameters and floating-point buffers with numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def save_once(path: Any, state: Mapping[str, Any], step: int = 1, **options: Any) -> None:
    """Saves and commits one step."""
    options.setdefault("audit", True)
    with Checkpointer(path, state, **options) as ckpt:
        ckpt.save(step).wait_committed()


def load_once(path: Any, state: Mapping[str, Any], **options: Any) -> Any:
    """Restores into a state; returns the report."""
    with Checkpointer(path, state, audit=True) as ckpt:
        return ckpt.restore(**options)


def data_files(path: Path, step: int) -> list[Path]:
    """The data files of a step."""
    return sorted((path / f"step-{step:08d}").glob("*.safetensors"))


def flip(path: Path, position: int, mask: int = 0x40) -> None:
    """Changes bits of one byte of a file; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


@dataclass
class Hold:
    """A place that the first thread to reach it stays at until it is told to go on."""

    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.go_on.wait(WAIT_S), "held, and never released"

    def wait_reached(self) -> None:
        assert self.reached.wait(WAIT_S), "this place was never reached"


@contextmanager
def held(point_glob: str) -> Iterator[Hold]:
    """Holds whoever reaches a fault point; released at the end of the block at the latest."""
    hold = Hold()
    try:
        with points.armed(callbacks={point_glob: hold}):
            yield hold
    finally:
        hold.go_on.set()


def wait_from(pool: BufferPool, count: int, hold: Hold) -> None:
    """Has a capture begin to wait for a further buffer when a place was reached, and not before.

    So whoever waits for a short time only does not give up before a slow thread has got there.
    """
    acquire, taken = pool.acquire, list[Any]()

    def later(deadline: Deadline) -> Any:
        if len(taken) >= count:
            hold.wait_reached()
            deadline = Deadline(deadline.budget)
        taken.append(acquire(deadline))
        return taken[-1]

    pool.acquire = later  # type: ignore[method-assign]


class FaultyFiles(OsFiles):
    """A file layer that asks `before(call, path or data)` first; what it raises is raised."""

    def __init__(self, before: Callable[[str, Any], object]) -> None:
        self._before = before

    def open(self, path: str, *, direct: bool = False) -> int:
        self._before("open", path)
        return super().open(path, direct=direct)

    def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        self._before("write", b"".join(parts))
        return super().write(fd, parts, at)

    def fsync(self, fd: int) -> None:
        self._before("fsync", fd)
        super().fsync(fd)


def faulty_storage(path: Path, before: Callable[[str, Any], object]) -> LocalStorage:
    """A local folder whose file layer asks first."""
    return LocalStorage(path, FaultyFiles(before))


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """Runs `work` in a thread; the event is set when it has returned."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def must_notice(check: Callable[..., object], *args: Any) -> None:
    """A check that fails under sabotage is worth something; this fails if it does not."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(*args)
