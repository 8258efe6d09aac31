"""Text as bytes: the dataset of the default job.

By default the sources of Python's own standard library, which every machine that runs this has.
Nothing here needs torch before a window is read.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from planaria.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_SIZE = 256
LIBRARY_BYTES = 8_000_000
"""Bytes that are read of the standard library unless told otherwise: about two thirds of it."""

_PROBE_BYTES = 8192
_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test",
}  # fmt: skip
# Written when Python was built or by a distributor, so they differ where the version does not.
_SKIPPED_PREFIXES = ("_sysconfig", "sitecustomize", "usercustomize")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Text:
    """Bytes and where they come from.

    Attributes:
        content: The files, joined.
        source: What was read, for messages.
    """

    content: bytes
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, with its algorithm's name."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"


def read_text(paths: PathLike | Sequence[PathLike] | None = None, limit: int | None = None) -> Text:
    """Reads text files into memory.

    Args:
        paths: Text files, or folders whose text files are joined in the order of their paths
            (without hidden files, and without files that hold a zero byte); None for the
            sources of Python's standard library, without tests.
        limit: Bytes to read at most; None for 8 MB of the standard library and all of one's own.

    Raises:
        ConfigError: A path does not exist or cannot be read, or there is no text.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"data.max_bytes is {limit}: give 1 or more, or none")
    if paths is None:
        folder = Path(sysconfig.get_path("stdlib"))
        limit = LIBRARY_BYTES if limit is None else limit
        content = _join(_library_files(folder), limit)
        if not content:
            raise ConfigError(
                f"found no Python sources in {folder}: this Python was installed without them; "
                "set data.paths to text of your own"
            )
        return Text(content, f"the standard library in {folder}")
    chosen = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    roots = [Path(path).expanduser() for path in chosen]
    for root in roots:
        if not root.exists():
            raise ConfigError(f"data.paths: {root} does not exist; give text files or folders")
    source = ", ".join(map(str, roots))
    content = _join((file for root in roots for file in _files(root)), limit)
    if not content:
        raise ConfigError(f"data.paths: found no text in {source or 'an empty list'}")
    return Text(content, source)


class TextWindows:
    """Windows of bytes, each with the bytes that follow its own; a map-style dataset.

    Window `i` starts at byte `i * seq_len` of its split: no two windows share a target. The end of
    the text is held out, the rest is for training.

    Args:
        text: What to cut; None for the standard library's sources.
        seq_len: Tokens in a window.
        split: "train" or "held_out".
        held_out: Share of the text that is held out.

    Attributes:
        fingerprint: That of the whole text, both splits. Other data, such as another Python
            version's sources, has another one, and a saved position is refused there.

    Raises:
        ConfigError: The text is too short for one window, or an argument is wrong.
    """

    def __init__(
        self,
        text: Text | None = None,
        seq_len: int = 128,
        split: str = "train",
        held_out: float = 0.05,
    ) -> None:
        if split not in ("train", "held_out"):
            raise ConfigError(f"the split {split!r}: give 'train' or 'held_out'")
        if seq_len < 1:
            raise ConfigError(f"data.seq_len is {seq_len}: give 1 or more")
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out is {held_out}: give a share of at least 0, below 1")
        text = text or read_text()
        self.fingerprint = text.fingerprint
        tokens = np.frombuffer(text.content, dtype=np.uint8)
        border = len(tokens) - int(len(tokens) * held_out)
        self._tokens = tokens[:border] if split == "train" else tokens[border:]
        self._seq_len = seq_len
        if not len(self):
            raise ConfigError(
                f"the {split} split of {text.source} has {len(self._tokens)} bytes: one window "
                f"takes data.seq_len + 1 = {seq_len + 1}"
            )

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._seq_len

    def __getitem__(self, index: int) -> "tuple[Tensor, Tensor]":
        """Returns tokens and targets, each int64, (seq_len,).

        Raises:
            IndexError: No such window.
        """
        import torch

        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._seq_len
        window = self._tokens[start : start + self._seq_len + 1]
        tokens = torch.from_numpy(window.astype(np.int64))
        return tokens[:-1], tokens[1:]


def _join(files: Iterator[Path], limit: int | None) -> bytes:
    content = bytearray()
    for file in files:
        if limit is not None and len(content) >= limit:
            break
        try:
            with file.open("rb") as opened:
                piece = opened.read(-1 if limit is None else limit - len(content))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        if b"\0" not in piece[:_PROBE_BYTES]:
            content += piece
    return bytes(content)


def _files(path: Path) -> Iterator[Path]:
    """Yields a file, or the files below a folder, in a fixed order; hidden ones are left out."""
    if path.is_file():
        yield path
        return
    for entry in _entries(path):
        # A link to a folder may lead back up.
        if not entry.name.startswith(".") and (entry.is_file() or not entry.is_symlink()):
            yield from _files(entry)


def _library_files(folder: Path) -> Iterator[Path]:
    """Yields the modules of the standard library in a fixed order."""
    for entry in _entries(folder):
        if entry.is_symlink():
            continue
        if entry.is_file():
            if entry.suffix == ".py" and not entry.name.startswith(_SKIPPED_PREFIXES):
                yield entry
        elif entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("config-"):
            yield from _library_files(entry)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}") from error
