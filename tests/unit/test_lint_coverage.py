"""ruff and pyright look into every folder: an error planted in each of them is reported, once."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from source_tree import FOLDERS, ROOT, python_files

# An unused import for ruff, a wrong type for pyright.
PLANTED = 'import os\n\nplanted: int = "planted"\n'


@pytest.fixture(scope="module")
def planted_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's folders, links and configuration, with nothing but one bad file in each."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in planted_folders():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "planted.py").write_text(PLANTED)
    for folder in FOLDERS:
        (root / "src" / "planaria" / folder).symlink_to(f"../../{folder}")
    # Lies where the real one does: it must not be looked into.
    (root / ".venv").mkdir()
    (root / ".venv" / "planted.py").write_text(PLANTED)
    return root


def planted_folders() -> set[Path]:
    return {path.parent.relative_to(ROOT) for path in python_files()} | {Path("examples")}


def test_every_part_has_a_planted_file() -> None:
    assert {
        Path(name) for name in (*FOLDERS, "src/planaria", "src/planaria/core", "tests/unit")
    } <= planted_folders()


@pytest.mark.parametrize("tool", ["pyright", "ruff"])
def test_errors_are_reported_in_every_folder(tool: str, planted_tree: Path) -> None:
    if tool == "pyright":
        output = run("pyright", "--outputjson", cwd=planted_tree)
        files = [
            each["file"]
            for each in json.loads(output)["generalDiagnostics"]
            if each.get("rule") == "reportAssignmentType"
        ]
    else:
        output = run("ruff", "check", "--no-cache", "--output-format=json", cwd=planted_tree)
        files = [each["filename"] for each in json.loads(output) if each["code"] == "F401"]
    reported = Counter(Path(os.path.realpath(file)).relative_to(planted_tree) for file in files)
    assert reported == Counter({folder / "planted.py": 1 for folder in planted_folders()})


def run(tool: str, *args: str, cwd: Path) -> str:
    """Runs a tool of this environment that is bound to find something; returns its output."""
    done = subprocess.run(
        [Path(sys.executable).parent / tool, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout
