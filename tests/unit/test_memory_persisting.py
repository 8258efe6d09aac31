"""Writing durable checkpoints out of memory: what a late or failing node does to what is there."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from planaria.checkpoint.memory.memory import Key, Span
from planaria.checkpoint.memory.persisting import Persisting
from planaria.core.deadline import Deadline
from planaria.errors import SaveFailedError

KEY, FILE, BYTES = Key(4, "aa"), "rank-00000-aa.safetensors", bytes(range(256)) * 40


class OneImage:
    """A node with one image, whose reading can be held up."""

    def __init__(self) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()
        self.fails = False

    def wait(self, key: Key, deadline: Deadline) -> None:
        raise SaveFailedError("it was given up")

    def hold(self, key: Key) -> None: ...

    def let_go(self, key: Key) -> None: ...

    def recoverable(self, deadline: Deadline) -> list[Any]:
        return []

    def serve(self, request: dict[str, Any], payloads: Any) -> Any:
        raise AssertionError(request)

    def local_span(self, key: Key, file: str) -> Any:
        return Span(0, len(BYTES)) if file == FILE else None

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        self.reading.set()
        assert self.go_on.wait(60)
        if self.fails:
            raise SaveFailedError("its memory is gone")
        into[:] = BYTES[offset : offset + len(into)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_node_that_is_late_harms_nothing_that_another_has_committed(
    tmp_path: Path, fails: bool
) -> None:
    """It was taken for lost, and what it held was decoded and written by another one."""
    node = OneImage()
    node.fails = fails
    persisting = Persisting("n", node, None, 60.0)  # type: ignore[arg-type]
    request = {"op": "persist", "key": KEY.to_json(), "root": str(tmp_path), "files": [FILE]}
    outcome: list[Any] = []

    def serve() -> None:
        try:
            outcome.append(persisting.serve(request, ())[0]["written"])
        except SaveFailedError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    assert node.reading.wait(60)
    committed = tmp_path / "step-00000004" / FILE
    committed.write_bytes(BYTES)
    node.go_on.set()
    thread.join(60)
    assert outcome == (["its memory is gone"] if fails else [[FILE]])
    assert committed.read_bytes() == BYTES
    assert [each.name for each in committed.parent.iterdir()] == [FILE]


def test_it_reads_as_committed_while_it_is_written_again(tmp_path: Path) -> None:
    node = OneImage()
    persisting = Persisting("n", node, None, 60.0)  # type: ignore[arg-type]
    committed = tmp_path / "step-00000004" / FILE
    committed.parent.mkdir()
    committed.write_bytes(BYTES)
    request = {"op": "persist", "key": KEY.to_json(), "root": str(tmp_path), "files": [FILE]}
    thread = threading.Thread(target=persisting.serve, args=(request, ()))
    thread.start()
    assert node.reading.wait(60)
    assert committed.read_bytes() == BYTES
    node.go_on.set()
    thread.join(60)
    assert committed.read_bytes() == BYTES


def test_a_log_on_a_full_disk_does_not_keep_a_failure_from_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        flush = write

    persisting = Persisting("n", OneImage(), None, 60.0)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Full())
        persisting.start(KEY, str(tmp_path), (), b"{}")
        with pytest.raises(SaveFailedError, match="given up"):
            persisting.wait(KEY, Deadline(30))
        persisting.settle(Deadline(30))
