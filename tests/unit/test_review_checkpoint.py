"""Faults found by reading: forks, signals, foreign files, names under FSDP2, hostile manifests."""

import hashlib
import json
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numba.core.caching
import numba.core.registry
import pytest
import torch
from torch import nn

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.capture import kernels, loops
from planaria.checkpoint.erasure import kernels as erasure_kernels
from planaria.checkpoint.format.dtypes import dtype_by_name
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.stop import StopSignals
from planaria.checkpoint.storage.base import open_storage
from planaria.core import points
from planaria.errors import ConfigError


def _state() -> dict[str, Any]:
    model = nn.Linear(3, 3)
    optim = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optim.step()
    return {"model": model, "optim": optim}


def says_so_and_sleeps(started: Any) -> None:
    started.set()
    time.sleep(60)


def test_a_forked_child_can_be_terminated(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"model": nn.Linear(2, 2)}) as ckpt:
        context = multiprocessing.get_context("fork")
        started = context.Event()
        child = context.Process(target=says_so_and_sleeps, args=(started,))
        child.start()
        assert started.wait(60)  # Python forgets signals that come in the middle of a fork
        child.terminate()
        child.join(60)
        alive = child.is_alive()
        child.kill()
        child.join()
        assert not alive
        assert not ckpt.should_stop


@pytest.mark.parametrize("first", [0, 1])
def test_handlers_come_back_in_any_order_of_closing(first: int) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    both = [StopSignals(), StopSignals()]
    signal.raise_signal(signal.SIGTERM)
    assert [s.requested for s in both] == [True, True]
    both[first].close()
    both[1 - first].close()
    assert [signal.getsignal(n) for n in numbers] == before


def test_files_of_others_below_a_step_survive(tmp_path: Path) -> None:
    foreign = tmp_path / "step-00000100" / "model.pt"
    left = tmp_path / "step-00000150" / "rank-00000-0123456789ab.safetensors"
    with Checkpointer(tmp_path, {"model": nn.Linear(2, 2)}) as ckpt:
        foreign.parent.mkdir()
        foreign.write_text("mine")
        left.parent.mkdir()
        left.write_text("of a save that was killed")
        ckpt.save(200).wait_committed()
        note = tmp_path / "step-00000200" / "eval.json"
        note.write_text("{}")
        ckpt.save(200).wait_committed()
    assert foreign.read_text() == "mine"
    assert note.exists()
    assert not left.parent.exists()
    assert len(list(note.parent.glob("*.safetensors"))) == 1


def test_a_failure_at_exit_is_told(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path, _state(), on_failure="fatal")
    with points.armed("eio@checkpoint.write.chunk"):
        ckpt.save(1)
        with pytest.warns(UserWarning, match="step 1 was not committed"):
            ckpt._atexit()  # what the interpreter calls


def test_kernels_work_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(loops, "any_above", loops.compiled(loops.any_above.py_func))
    assert kernels.has_nan(memoryview(b"\x00\x00\xc0\x7f"), dtype_by_name("float32"))
    assert loops.any_above.stats.cache_path is None


def uncached(functions: Iterable[Any]) -> list[str]:
    """Compiled functions that numba's cache on disk would not find again in the next process."""
    made = [f.py_func for f in functions if isinstance(f, numba.core.registry.CPUDispatcher)]
    assert made
    return [f.__name__ for f in made if f.__closure__]


def test_kernels_are_compiled_once_for_all_processes() -> None:
    assert not uncached(vars(loops).values())
    assert not uncached(vars(erasure_kernels).values())
    copy = loops._copy
    within = loops.compiled(lambda target, source: copy(target, source, 1))  # pyright: ignore[reportCallIssue]
    assert uncached([within]) == ["<lambda>"]  # as they were


def test_fsspecs_local_urls_are_durable_folders(tmp_path: Path) -> None:
    assert open_storage(f"local://{tmp_path}").local == str(tmp_path)


def test_optimizers_that_hide_their_state_are_refused() -> None:
    hiding = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})(nn.Linear(1, 1).parameters())
    with pytest.raises(ConfigError, match="ZeroRedundancyOptimizer"):
        StateSet({"optim": hiding})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("objects", "optim.param_groups"), {"ranks": {"x": []}}),
        (
            ("objects", "optim.param_groups"),
            {"all": [{"params": ["weight", "bias"], "settings": 5}]},
        ),
        (("metrics",), {"$": "tuple", "v": 3}),
        (("checksum",), ["crc32c"]),
        (("format",), 0.5),
    ],
)
def test_a_manifest_that_makes_no_sense_is_fallen_back_from(
    tmp_path: Path, place: tuple[str, ...], value: Any
) -> None:
    state = _state()
    with Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait_committed()
        ckpt.save(2).wait_committed()
        path = tmp_path / "step-00000002" / "manifest.json"
        body = json.loads(path.read_bytes())["manifest"]
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        _write(path, json.dumps(body, separators=(",", ":")).encode())
        report = ckpt.restore()
    assert report is not None
    assert (report.step, [s for s, _ in report.fell_back_from]) == (1, [2])


def test_a_manifest_nested_too_deeply_is_fallen_back_from(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, _state()) as ckpt:
        ckpt.save(1).wait_committed()
        ckpt.save(2).wait_committed()
        depth = 100_000
        deep = b'{"format":1,"run":' + b"[" * depth + b"]" * depth + b"}"
        _write(tmp_path / "step-00000002" / "manifest.json", deep)
        report = ckpt.restore()
    assert report is not None
    assert report.step == 1


def test_verify_allocates_no_more_than_there_is(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, _state()) as ckpt:
        ckpt.save(1).wait_committed()
    path = tmp_path / "step-00000001" / "manifest.json"
    body = json.loads(path.read_bytes())["manifest"]
    chunks = 20_000
    body["files"][0][2:4] = [chunks << 30, 1 << 30]
    body["files"][0][5] = "00000000" * chunks
    _write(path, json.dumps(body, separators=(",", ":")).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problems = open_checkpoint(tmp_path).verify()
    assert len(problems) >= chunks


def _write(path: Path, body: bytes) -> None:
    digest = hashlib.sha256(body).hexdigest().encode()
    path.write_bytes(b'{"sha256":"' + digest + b'","manifest":' + body + b"}\n")
