"""Who may import whom, and that importing a package costs nothing."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import FOLDERS, PACKAGE, ROOT, Module, imported_names, modules, python_files

BASE = {"core", "errors", "telemetry", "data"}
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "telemetry": {"core", "errors"},
    "data": {"core", "errors", "telemetry"},
    "checkpoint": BASE,
    "elastic": BASE | {"checkpoint", "parallel"},
    "rl_sync": BASE | {"checkpoint"},
    "parallel": {"core", "errors"},
    "launch": BASE | set(FOLDERS),
    # The plug-in lends the fault schedules to other projects' tests.
    "_pytest": {"core", "errors", "elastic"},
    # Tells Hydra where the configuration lies, without loading it.
    "planaria_searchpath": set(),
    # The facade.
    "": BASE | {"checkpoint"},
}
HEAVY = ("torch", "numba", "hydra")


def parts_imported(module: Module) -> dict[str, int]:
    """Other parts of Planaria that a module imports, and where."""
    found = {}
    for name, line in imported_names(module.tree, module):
        top, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        known = part in MAY_IMPORT or (PACKAGE / part).is_dir()
        if top == "planaria" and part and known and part != module.part:
            found.setdefault(part, line)
    return found


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_follow_the_layers(module: Module) -> None:
    assert module.part in MAY_IMPORT, f"say in MAY_IMPORT what {module.part} may import"
    wrong = {
        part: line
        for part, line in parts_imported(module).items()
        if part not in MAY_IMPORT[module.part]
    }
    assert not wrong, f"{module.path}: may not import {wrong} (part: line)"


def test_a_forbidden_import_is_noticed() -> None:
    source = "def f():\n    from planaria import launch\n    import_module('planaria.elastic.x')\n"
    planted = Module("planaria.core.x", PACKAGE / "core" / "x.py", ast.parse(source))
    assert parts_imported(planted) == {"launch": 2, "elastic": 3}


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_resolves_to_the_folder(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert link.readlink() == Path(f"../../{folder}")
    assert link.resolve() == ROOT / folder
    module = importlib.import_module(f"planaria.{folder}")
    assert module.__file__ is not None
    assert os.path.realpath(module.__file__) == str(ROOT / folder / "__init__.py")


def test_links_are_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", *[f"src/planaria/{folder}" for folder in FOLDERS]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}
    assert modes == {f"src/planaria/{folder}": "120000" for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_imported_as_part_of_planaria_only(folder: str) -> None:
    # From the root, where Python finds the folder.
    done = run_python(f"import {folder}")
    assert done.returncode == 1
    assert f"import this package as 'planaria.{folder}'" in done.stderr
    assert folder not in sys.modules


def test_nobody_imports_a_folder_by_itself() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in python_files()
        for name, line in imported_names(
            ast.parse(path.read_text()), next((m for m in modules() if m.path == path), None)
        )
        if name.partition(".")[0] in FOLDERS
    ]
    assert not wrong


PACKAGES = [m.name for m in modules() if m.is_package and m.name.startswith("planaria")]
IMPORTS = """
import importlib, json, sys
found = {}
for name in sys.argv[2:]:
    before = set(sys.modules)
    importlib.import_module(name)
    found[name] = [each for each in json.loads(sys.argv[1]) if each in sys.modules.keys() - before]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What heavy each package was the first to load, all of them imported one after the other."""
    done = run_python(IMPORTS, json.dumps(HEAVY), *PACKAGES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(
    package: str, loaded: dict[str, list[str]]
) -> None:
    assert loaded[package] == []


def test_a_heavy_import_is_noticed() -> None:
    done = run_python(IMPORTS, json.dumps(["wave"]), "json", "wave")
    assert json.loads(done.stdout) == {"json": [], "wave": ["wave"]}


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
