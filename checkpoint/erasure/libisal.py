"""Finds ISA-L: the system's, or the one that pyeclib brings along.

Nothing is ever loaded from the current directory or from where a script lies: the system's library
is asked for by its name, which the dynamic linker looks up in its own folders and in those of
LD_LIBRARY_PATH, and pyeclib is looked for in this interpreter's package folders only.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import site
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SYSTEM = ("libisal.so.2",)
_BUNDLED = re.compile(r"pyeclib\.libs/libisal-[\w.-]+")


def libraries() -> Iterator[ctypes.CDLL]:
    """The libraries of that name that can be loaded, the system's first."""
    for name in (*_SYSTEM, *bundled()):
        with suppress(OSError):
            yield ctypes.CDLL(str(name))


def bundled() -> Iterator[Path]:
    """The libraries in the package folders of this interpreter."""
    for folder in package_folders():
        for package in importlib.metadata.distributions(name="pyeclib", path=[str(folder)]):
            for file in package.files or ():
                path = folder / file
                if _BUNDLED.fullmatch(file.as_posix()) and path.is_file():
                    yield path


def package_folders() -> list[Path]:
    """Where this interpreter's packages are installed."""
    paths = sysconfig.get_paths()
    folders = [paths["platlib"], paths["purelib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders) if Path(folder).is_absolute()]
