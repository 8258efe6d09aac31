"""Remote stores that fail, hang, lie and return too little."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import must_notice
from flaky_store import FlakyStore, going_wrong
from save_cases import everything, start

from planaria.checkpoint import Checkpointer, open_checkpoint, points
from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage import remote
from planaria.checkpoint.storage.base import open_storage, reading
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import armed
from planaria.errors import (
    ConfigError,
    DeadlineError,
    RootLockedError,
    SaveFailedError,
    StorageError,
)


@pytest.fixture
def store(tmp_path: Path) -> RemoteStorage:
    return RemoteStorage(f"flaky://{tmp_path}/store")


DATA = bytes(range(256)) * 16


def test_what_comes_short_is_completed(store: RemoteStorage) -> None:
    store.put("x", DATA)
    buffer = bytearray(len(DATA))
    with (
        going_wrong(returned=lambda path, data: data[: len(data) // 2 + 1]),
        pytest.raises(OSError, match="only"),
    ):
        store.read_into("x", 0, memoryview(bytearray(1 << 12)))
    calls = iter([10, 100, 1000])
    with going_wrong(returned=lambda path, data: data[: next(calls, None)]):
        assert store.read_into("x", 0, memoryview(buffer)) == len(DATA)
    assert buffer == DATA


def test_the_end_of_a_file_is_the_end(store: RemoteStorage) -> None:
    store.put("x", DATA)
    buffer = memoryview(bytearray(len(DATA)))
    assert store.read_into("x", len(DATA) - 7, buffer) == 7
    assert bytes(buffer[:7]) == DATA[-7:]
    assert store.read_into("x", len(DATA) + 7, buffer) == 0
    with pytest.raises(FileNotFoundError):
        store.read_into("y", 0, buffer)


def test_several_ranges_are_one(store: RemoteStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_NBYTES", 100)
    store.put("x", DATA)
    buffer = bytearray(1234)
    assert store.read_into("x", 50, memoryview(buffer)) == 1234
    assert buffer == DATA[50 : 50 + 1234]
    with going_wrong(returned=lambda path, data: data + b"!"), pytest.raises(OSError):
        store.read_into("x", 50, memoryview(buffer))


def test_a_call_that_hangs_has_a_deadline(tmp_path: Path) -> None:
    store, go_on = RemoteStorage(f"flaky://{tmp_path}", timeout_s=0.05), threading.Event()
    try:
        with going_wrong(before=lambda operation, path: go_on.wait(60)):
            for call in (store.list, lambda: store.read("x"), lambda: store.put("x", b"")):
                with pytest.raises(DeadlineError, match=r"no answer within 0\.05 s"):
                    call()
    finally:
        go_on.set()


@pytest.mark.parametrize(
    "error", [OSError(5, "Unknown answer"), RuntimeError("no connection"), ValueError("nonsense")]
)
def test_trouble_is_no_damage(
    store: RemoteStorage, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore must not fall back because a store is out of reach."""
    monkeypatch.setattr("planaria.checkpoint.storage.base.READ_AGAIN_AFTER_S", (0.0, 0.0))
    store.put("x", DATA)

    def fail(operation: str, path: str) -> None:
        raise error

    with going_wrong(before=fail), pytest.raises(StorageError, match="it may well be whole"):
        reading("x", lambda: store.read("x"))


def test_an_upload_that_fails_leaves_nothing(store: RemoteStorage, tmp_path: Path) -> None:
    writer = store.create("f")
    writer.write(DATA * 20)

    def fail(operation: str, path: str) -> None:
        if operation == "finish":
            raise OSError(104, "Connection reset by peer")

    with going_wrong(before=fail), pytest.raises(OSError, match="Connection reset"):
        writer.finish()
    writer.abort()
    assert store.list() == []
    assert list((tmp_path / "store").iterdir() if (tmp_path / "store").exists() else []) == []


def test_a_store_that_keeps_half_is_found_out(store: RemoteStorage) -> None:
    writer = store.create("f")
    writer.write(DATA)
    with (
        going_wrong(kept=lambda path, data: data[:-1]),
        pytest.raises(StorageError, match="4096 bytes were sent, 4095 are there"),
    ):
        writer.finish()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        open_storage("nosuch://x")


# Commits


def manifest(attempt: str) -> Manifest:
    return Manifest(1, attempt, 0.0, 1, [], {})


@pytest.mark.parametrize("conditional", [True, False])
def test_of_two_writers_one_wins(
    tmp_path: Path, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it can only be told by reading back; no writer is told that it won and has not."""
    monkeypatch.setattr(remote, "_takes_mode", lambda fs: conditional)
    roots = [Root(RemoteStorage(f"flaky://{tmp_path}/root")) for _ in range(2)]
    for root in roots:
        root.claim()
    both, outcomes = threading.Barrier(2, timeout=30), dict[str, Exception | None]()

    def commit(root: Root, attempt: str) -> None:
        try:
            root.commit(manifest(attempt))
            outcomes[attempt] = None
        except Exception as error:
            outcomes[attempt] = error

    with armed(callbacks={points.MANIFEST_WRITTEN: lambda name, step: both.wait()}):
        threads = [
            threading.Thread(target=commit, args=each)
            for each in zip(roots, ("aa", "bb"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    winner = roots[0].manifest(1).attempt
    assert outcomes[winner] is None
    (loser,) = {"aa", "bb"} - {winner}
    if conditional:
        error = outcomes[loser]
        assert isinstance(error, RootLockedError)
        assert "another job has committed step 1" in str(error)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_store_that_knows_no_conditional_write(
    store: RemoteStorage, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FlakyStore.pipe_file

    def pipe_file(self: FlakyStore, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(number, "A header you provided implies what is not implemented")
        plain(self, path, value)

    monkeypatch.setattr(FlakyStore, "pipe_file", pipe_file)
    store.put_new("x", b"1")
    assert store.read("x") == b"1"
    with pytest.raises(FileExistsError):
        store.put_new("x", b"2")
    assert store.read("x") == b"1"


def test_a_late_writer_is_told(tmp_path: Path) -> None:
    first, second = (Root(RemoteStorage(f"flaky://{tmp_path}/root")) for _ in range(2))
    first.claim()
    second.claim()
    first.commit(manifest("aa"))
    first.commit(manifest("cc"))  # its own step, saved again
    with pytest.raises(RootLockedError, match="another job has committed step 1"):
        second.commit(manifest("bb"))
    assert first.manifest(1).attempt == "cc"
    second.claim()
    second.commit(manifest("bb"))  # knowing what is there


def test_a_commit_whose_answer_was_lost_counts(tmp_path: Path) -> None:
    root = Root(RemoteStorage(f"flaky://{tmp_path}/root"))
    root.claim()
    data = manifest("aa").to_bytes()
    names = points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED
    root.write_manifest(1, data, again=False, points=names)
    root.write_manifest(1, data, again=False, points=names)


def check_lies_about_the_manifest_are_noticed(url: str, lie: Any) -> None:
    def kept(path: str, data: bytes) -> bytes | None:
        return lie(data) if path.endswith(manifest_format.NAME) else data

    with Checkpointer(url, start(), on_failure="fatal", audit=True) as ckpt:
        ckpt.save(1).wait_committed()
        with going_wrong(kept=kept), pytest.raises(SaveFailedError, match="are read back"):
            ckpt.save(2).wait_committed()
        with pytest.raises(SaveFailedError):
            ckpt.step(3)


LIES = [lambda data: None, lambda data: data[:-1], lambda data: b"{" + data[1:-2] + b"\n}"]


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_about_the_manifest(tmp_path: Path, lie: Any) -> None:
    check_lies_about_the_manifest_are_noticed(f"flaky://{tmp_path}/root", lie)
    assert open_checkpoint(f"flaky://{tmp_path}/root").step in (1, 2)


def test_sabotage_no_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Root, "_read_back", lambda *_: None)
    must_notice(check_lies_about_the_manifest_are_noticed, f"flaky://{tmp_path}/root", LIES[0])


def test_saving_straight_to_a_store(tmp_path: Path) -> None:
    url, state = f"flaky://{tmp_path}/root", start()
    with Checkpointer(url, state, keep=2, audit=True) as ckpt:
        for step in (1, 2, 3, 3):
            ckpt.save(step).wait_committed()
    target = start(2)
    with Checkpointer(url, target, audit=True) as ckpt:
        report = ckpt.restore()
    assert report is not None
    assert (report.step, report.tier) == (3, "durable")
    assert everything(target)["model"] == everything(state)["model"]
