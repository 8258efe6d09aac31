"""A remote store for tests: a folder behind fsspec's interface, on which chosen things go wrong.

URLs are ``flaky:///path/of/a/folder``. What is in it outlives the process, as in a real store, and
an object is there whole or not at all.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

_HIDDEN = ".upload-"


class Faults:
    """What goes wrong; a test sets what it needs.

    Attributes:
        before: Called with operation and path before each; what it raises is raised.
        kept: What becomes of the bytes that were confirmed: (path, bytes) -> bytes, or None.
        returned: What a read returns: (path, bytes) -> bytes.
    """

    def __init__(self) -> None:
        self.before: Callable[[str, str], object] = lambda operation, path: None
        self.kept: Callable[[str, bytes], bytes | None] = lambda path, data: data
        self.returned: Callable[[str, bytes], bytes] = lambda path, data: data


faults = Faults()


@contextlib.contextmanager
def going_wrong(**what: Any) -> Iterator[None]:
    """A block in which some of `Faults` are set."""
    before = vars(faults).copy()
    vars(faults).update(what)
    try:
        yield
    finally:
        vars(faults).update(before)


class FlakyStore(AbstractFileSystem):
    """See the module."""

    protocol = "flaky"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        at = self._at("list", path)
        names = [n for n in sorted(os.listdir(at)) if not n.startswith(_HIDDEN)]
        found = [self._info(f"{at}/{name}") for name in names]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._info(self._at("look", path))

    def _info(self, at: str) -> dict[str, Any]:
        size = os.stat(at).st_size
        kind = "directory" if os.path.isdir(at) else "file"
        return {"name": at, "size": size, "type": kind}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        at = self._at("read", path)
        with open(at, "rb") as file:
            data = file.read()
        if start is not None and start >= len(data):
            raise OSError(22, "the range begins past the end")  # as S3 does
        return faults.returned(at, data[start:end])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        at = self._at("put", path)
        put(at, faults.kept(at, bytes(value)), new=mode == "create")

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **_: Any,
    ) -> Any:
        return FlakyFile(self, self._at("open", path), mode, block_size=block_size)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(self._at("makedirs", path), exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        os.unlink(self._at("remove", path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        at = self._at("remove", path)
        for name in os.listdir(at):
            os.unlink(f"{at}/{name}")
        os.rmdir(at)

    def rmdir(self, path: str) -> None:
        at = self._at("remove", path)
        for name in os.listdir(at):
            if name.startswith(_HIDDEN):
                os.unlink(f"{at}/{name}")
        os.rmdir(at)

    def _at(self, operation: str, path: str) -> str:
        at = str(self._strip_protocol(path))
        faults.before(operation, at)
        return at


class FlakyFile(AbstractBufferedFile):
    """A file that is sent in blocks and is there once it is closed."""

    def __del__(self) -> None:
        """Sends nothing: what is collected is collected in any thread, which would be held."""

    def _initiate_upload(self) -> None:
        self._whole = bytearray()

    def _upload_chunk(self, final: bool = False) -> None:
        faults.before("block", self.path)
        self._whole += self.buffer.getvalue()
        if final:
            faults.before("finish", self.path)
            put(self.path, faults.kept(self.path, bytes(self._whole)))


def put(at: str, data: bytes | None, *, new: bool = False) -> None:
    """Makes an object, whole."""
    os.makedirs(os.path.dirname(at), exist_ok=True)
    if data is None:
        return
    hidden = f"{os.path.dirname(at)}/{_HIDDEN}{secrets.token_hex(8)}"
    with open(hidden, "wb") as file:
        file.write(data)
    if new:
        try:
            os.link(hidden, at)
        finally:
            os.unlink(hidden)
    else:
        os.replace(hidden, at)


fsspec.register_implementation("flaky", FlakyStore, clobber=True)
