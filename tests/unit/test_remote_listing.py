"""A root in a store whose calls take long: its folders are listed several at a time."""

import threading
from typing import Any

import fsspec
import pytest

from planaria.checkpoint.storage import root as root_module
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root
from planaria.errors import DeadlineError

STEPS = 8


class Counted(RemoteStorage):
    """Folders are only listed once so many are asked for at a time."""

    def __init__(self, url: str, at_a_time: int) -> None:
        super().__init__(url, timeout_s=60.0)
        self._together = threading.Barrier(at_a_time)

    def list(self, path: str = "") -> list[str]:
        if path:
            self._together.wait(60)
        return super().list(path)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Any:
    where = f"memory://{request.node.name}"
    files = fsspec.filesystem("memory")
    for step in range(STEPS):
        files.pipe(f"/{request.node.name}/step-{step:08d}/manifest.json", b"{}")
    files.pipe(f"/{request.node.name}/step-{STEPS:08d}/rank-00000-ab.safetensors", b"")
    yield where
    files.rm(f"/{request.node.name}", recursive=True)


def test_several_folders_at_a_time(url: str) -> None:
    assert Root(Counted(url, (STEPS + 1) // 3)).steps() == list(range(STEPS))


def test_one_after_the_other_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_module, "_LISTS", 1)
    storage = Counted(url, (STEPS + 1) // 3)
    threading.Timer(1.0, storage._together.abort).start()
    with pytest.raises(threading.BrokenBarrierError):
        Root(storage).steps()


def test_a_folder_that_is_not_answered_for_ends_it(url: str) -> None:
    held = threading.Event()

    class Hangs(RemoteStorage):
        def list(self, path: str = "") -> list[str]:
            if path.endswith("3"):
                return self.call("list", lambda: [str(held.wait(60))])
            return super().list(path)

    try:
        with pytest.raises(DeadlineError, match=r"no answer within 0\.5 s"):
            Root(Hangs(url, timeout_s=0.5)).steps()
    finally:
        held.set()
