"""The life of a snapshot process: found or started, kept or ended, whatever happens to it."""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_jobs import eventually, processes, runtime_folder

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory import starting
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.runtime import Place, places
from planaria.checkpoint.memory.starting import connect_or_start
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    DeadlineError,
    MemoryBudgetError,
    PlanariaError,
    SaveFailedError,
    WireError,
)

OPTIONS = Options("job", "node", 4 << 20, idle_s=60.0, timeout_s=20.0)
NBYTES = 8192
Open = Callable[..., NodeClient]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


@pytest.fixture
def open_node() -> Iterator[Open]:
    opened: list[NodeClient] = []

    def open_it(**options: Any) -> NodeClient:
        made = Options(**{**vars(OPTIONS), **options})
        opened.append(connect_or_start(made, f"rank {len(opened)}", Deadline(60)))
        return opened[-1]

    yield open_it
    for client in opened:
        client.close()


def snapshot(node: NodeClient, step: int, value: int | None = None, file: str = "a") -> Key:
    """Takes a snapshot of one file, all bytes the step's number or another value."""
    key = Key(step, f"a{step}")
    image = node.begin(key, file, NBYTES, Deadline(30))
    image[:] = step if value is None else value
    node.seal(key, file, [checksum(image[4096:])], 4096, 4096)
    node.describe(key, b"manifest %d" % step, Deadline(30))
    node.wait(key, Deadline(30))
    return key


def newest(node: NodeClient) -> Key | None:
    found = node.recoverable(Deadline(30))
    return found[0].key if found else None


def test_who_comes_first_starts_it_and_all_others_find_it() -> None:
    found: list[NodeClient] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(connect_or_start(OPTIONS, "rank", Deadline(60)))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({node.pid for node in found}) == 1
    (info,) = processes()
    assert info.uuid == found[0].uuid
    for node in found:
        node.close(part=True)
    eventually(lambda: not processes(), "the end, once all have parted")
    eventually(lambda: not places(), "its folder removed")


def test_its_folder_is_private_and_torch_is_not_loaded(open_node: Open, runtime: Path) -> None:
    node = open_node()
    (place,) = places()
    for path in (runtime, place.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((place.path / "socket").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.token.stat().st_mode) == 0o600
    assert "libtorch" not in Path(f"/proc/{node.pid}/maps").read_text()
    assert os.getsid(node.pid) != os.getsid(0)


def test_a_runtime_folder_that_others_can_open_is_refused(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="user alone"):
        connect_or_start(OPTIONS, "rank", Deadline(60))
    runtime.chmod(0o700)


def test_what_a_rank_left_is_there_for_the_next(open_node: Open) -> None:
    first = open_node()
    first.configure([first.member], Scheme(0), 1)
    snapshot(first, 1)
    key = snapshot(first, 2)
    first.close()  # as if it had been killed: it has not parted
    second = open_node()
    assert second.pid == first.pid
    assert newest(second) == key
    image = second.local(key, "a")
    assert image is not None
    assert np.all(image == 2)
    part = bytearray(100)
    second.fetch(key, "a", 5000, memoryview(part), Deadline(30))
    assert part == bytes([2] * 100)


def test_a_rank_that_dies_in_its_capture_takes_the_snapshot_along(open_node: Open) -> None:
    rank, other = open_node(), open_node()
    rank.configure([rank.member], Scheme(0), 2)
    key = Key(1, "a1")
    rank.begin(key, "a", NBYTES, Deadline(30))
    image = other.begin(key, "b", NBYTES, Deadline(30))
    image[:] = 1
    other.seal(key, "b", [checksum(image[4096:])], 4096, 4096)
    rank.close()
    with pytest.raises(SaveFailedError, match=r"rank 0 is gone|has gone"):
        other.wait(key, Deadline(30))
    assert newest(other) is None
    eventually(lambda: other.status()["used"] == 0, "its memory free again")


def test_it_ends_after_an_idle_time(open_node: Open) -> None:
    for idle_s in (0.5, 5.0, 50.0):  # on a slow machine it may end before anybody has come
        with contextlib.suppress(WireError):
            open_node(idle_s=idle_s).close()
            break
    eventually(lambda: not processes(), "the end of an idle process")
    eventually(lambda: not places(), "its folder removed")


def test_it_ends_when_told_to(open_node: Open) -> None:
    node = open_node()
    node.stop()
    eventually(lambda: not processes(), "the end")


def test_a_socket_that_was_removed_comes_back(open_node: Open) -> None:
    node = open_node()
    (place,) = places()
    (place.path / "socket").unlink()
    again = open_node()
    assert again.pid == node.pid
    assert stat.S_IMODE((place.path / "socket").stat().st_mode) == 0o600


def test_a_hung_process_is_replaced(open_node: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_ANSWER_S", 1.0)
    node = open_node()
    os.kill(node.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError):
        node.status(0.5)
    again = open_node()
    assert again.pid != node.pid
    assert again.uuid != node.uuid
    assert [info.uuid for info in processes()] == [again.uuid]


def test_a_killed_process_is_replaced(open_node: Open) -> None:
    node = open_node()
    os.kill(node.pid, signal.SIGKILL)
    with pytest.raises(WireError):
        node.status()
    again = open_node()
    assert again.uuid != node.uuid


def test_another_token_opens_nothing(open_node: Open) -> None:
    node = open_node()
    with pytest.raises(WireError, match="token"):
        connect_or_start(OPTIONS, "rank", Deadline(60), token=b"another token of another job")
    assert node.status()["pid"] == node.pid  # it was not killed for that
    assert len(processes()) == 1


def test_two_jobs_on_a_machine_do_not_meet(open_node: Open) -> None:
    one, two = open_node(job="one"), open_node(job="two")
    assert one.pid != two.pid
    for value, node in enumerate((one, two), 1):
        node.configure([node.member], Scheme(0), 1)
        snapshot(node, 5, value)
    for value, node in enumerate((one, two), 1):
        image = node.local(Key(5, "a5"), "a")
        assert image is not None
        assert np.all(image == value)


def test_a_budget_that_does_not_do_is_told(open_node: Open) -> None:
    node = open_node(budget=1 << 16)
    node.configure([node.member], Scheme(0), 1)
    snapshot(node, 1)
    with pytest.raises(MemoryBudgetError, match="larger budget"):
        node.begin(Key(2, "a2"), "a", 1 << 17, Deadline(5))
    assert newest(node) == Key(1, "a1")


def test_what_cannot_start_says_why() -> None:
    with pytest.raises(PlanariaError, match=r"256\.1\.1\.1"):
        connect_or_start(Options(**{**vars(OPTIONS), "host": "256.1.1.1"}), "r", Deadline(60))
    assert not processes()


def test_the_place_of_a_dead_one_is_taken_over(open_node: Open) -> None:
    place = Place.of(OPTIONS.job, OPTIONS.node)
    node = open_node()
    os.kill(node.pid, signal.SIGKILL)
    eventually(lambda: not processes(), "its end")
    assert place.info() is not None  # it could not clear up
    assert open_node().pid != node.pid


def test_a_process_whose_folder_was_removed_ends_when_it_is_alone(open_node: Open) -> None:
    node = open_node()
    (place,) = places()
    (info,) = processes()
    node.status()
    place.clear()
    assert node.status()["pid"] == node.pid  # who is connected is served
    node.close()
    eventually(lambda: not info.alive, "its end")


def test_what_others_may_have_put_into_the_runtime_folder_is_not_touched(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is listed there may be removed: it must be ours, and lie where it seems to."""
    runtime.mkdir(mode=0o700)
    (tmp_path / "theirs" / "ckpt").mkdir(parents=True)
    (runtime / "job").symlink_to(tmp_path / "theirs")
    (runtime / "other").mkdir()
    (runtime / "other" / "node").symlink_to(tmp_path / "theirs")
    assert places() == []
    Place(runtime / "third" / "node").make()
    (found,) = places()
    assert found.path == runtime / "third" / "node"
    real = os.scandir

    def gone(path: Any) -> Any:
        found.clear()
        return real(path)

    monkeypatch.setattr(os, "scandir", lambda path: (gone if "third" in str(path) else real)(path))
    assert places() == []  # it ended just now
    monkeypatch.undo()
    runtime.chmod(0o755)
    with pytest.raises(ConfigError, match="user alone"):
        places()
    runtime.chmod(0o700)


def test_what_is_in_use_never_looks_old(runtime: Path) -> None:
    """Folders for temporary files are cleared of files that nobody has touched for days."""
    place = Place.of("job", "node")
    place.make()
    files = [place.token, *(place.path / name for name in ("lock", "socket", "info.json", "log"))]
    for file in files[:-1]:  # the log may be gone already
        file.touch()
        os.utime(file, (1, 1))
    place.keep_fresh()
    assert all(file.stat().st_mtime > 1e9 for file in files[:-1])
    assert not files[-1].exists()
