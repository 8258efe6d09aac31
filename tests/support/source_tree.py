"""The project's own source files, parsed, for tests on its structure."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "planaria"
FOLDERS = ("checkpoint", "elastic", "parallel", "rl_sync", "launch")


@dataclass(frozen=True)
class Module:
    """One source file of the import package.

    Attributes:
        name: Its dotted name, as it is imported.
        path: Its file, not through a link.
        tree: Its syntax tree.
    """

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is a package's `__init__`."""
        return self.path.name == "__init__.py"

    @property
    def part(self) -> str:
        """The second component of its name: `core`, `checkpoint`...; empty for `planaria`."""
        return self.name.partition(".")[2].partition(".")[0]

    def __str__(self) -> str:
        return self.name


@cache
def modules() -> tuple[Module, ...]:
    """Every module that is installed: `planaria` with the five folders, and its Hydra plug-in."""
    bases = {PACKAGE: "planaria", PACKAGE.parent / "hydra_plugins": "hydra_plugins"}
    found = []
    for base, prefix in (bases | {ROOT / each: f"planaria.{each}" for each in FOLDERS}).items():
        for path in sorted(base.rglob("*.py")):
            inside = path.relative_to(base)
            # Some versions of rglob follow links, and the folders have their own turn.
            if base == PACKAGE and inside.parts[0] in FOLDERS:
                continue
            names = [prefix, *inside.with_suffix("").parts]
            if names[-1] == "__init__":
                names.pop()
            found.append(Module(".".join(names), path, ast.parse(path.read_text(), str(path))))
    return tuple(found)


@cache
def python_files() -> tuple[Path, ...]:
    """Every Python file of the repository, tests and scripts included, not through links."""
    tops = [*FOLDERS, "examples", "tests"]
    found = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    found += [each.path for each in modules() if each.path.is_relative_to(PACKAGE.parent)]
    return tuple(sorted(path for path in found if "__pycache__" not in path.parts))


def imported_names(tree: ast.AST, module: Module | None = None) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, wherever in it, with their lines.

    `from a import b` gives both `a` and `a.b`, since `b` may be a module. Relative imports are
    resolved against `module`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                assert module is not None
                package = module.name.split(".")
                drop = node.level - module.is_package
                base = ".".join(package[: len(package) - drop] + ([base] if base else []))
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, node.lineno
