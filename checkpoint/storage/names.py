"""The names in a checkpoint root: which are ours, and which a save may leave in a step's folder."""

import re

from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import FileInfo, Manifest

MARKER = "planaria.json"
_TEMPORARY = r"\.tmp-[0-9a-f]{8}"
#: Left in the root by a crash.
ROOT_TEMPORARY = re.compile(rf"(planaria|lock|mirror)\.json{_TEMPORARY}")
_OURS = re.compile(
    rf"planaria\.json|lock|lock\.json|mirror\.json|step-\d{{8,}}|{ROOT_TEMPORARY.pattern}"
)
STEP = re.compile(r"step-(\d{8,})")
#: Sets a step of this attempt aside.
MARK = re.compile(r"abandoned-(\w+)")
# What a save may leave in a step's folder; anything else is somebody's own, and kept.
_DATA = r"rank-\d+-[0-9a-f]+\.safetensors"
_TEMPORARIES = rf"(?:manifest\.json|abandoned-\w+|{_DATA}){_TEMPORARY}"
LEFT = re.compile(rf"{_DATA}|abandoned-\w+|{_TEMPORARIES}")
#: Of which attempt a file is, or that a crash has left it.
ATTEMPT = re.compile(rf"rank-\d+-([0-9a-f]+)\.safetensors|({_TEMPORARIES})")


#: The name of a data file, wherever it stands. It holds the save's random id: no two are alike.
DATA_FILE = re.compile(_DATA)


def step_folder(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


def data_path(manifest: Manifest, file: FileInfo) -> str:
    """Where a data file of a step lies in the root: it may be another step's."""
    return f"{step_folder(manifest.step if file.step is None else file.step)}/{file.name}"


def data_label(file: FileInfo) -> str:
    """How a data file is named to people: with its folder, where that is another step's."""
    return file.name if file.step is None else f"{step_folder(file.step)}/{file.name}"


def is_ours(name: str) -> bool:
    """Whether a name in a root may be Planaria's."""
    return _OURS.fullmatch(name) is not None


def is_saved(name: str) -> bool:
    """Whether a save may have put a file of this name into a step's folder."""
    return name == manifest_format.NAME or LEFT.fullmatch(name) is not None


def is_stale(name: str, attempt: str) -> bool:
    """Whether an attempt other than the committed one has left the file, or a crash in writing."""
    return LEFT.fullmatch(name) is not None and (attempt not in name or ".tmp-" in name)
