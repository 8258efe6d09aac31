"""House rules that a reviewer would otherwise have to look for in every change."""

import ast
import builtins
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator

import pytest
from source_tree import FOLDERS, ROOT, Module, modules, python_files

import planaria
from planaria import errors

MAX_LINES = 500
# Each runs code found in what it reads.
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
}
OBJECT_COLLECTIVE = re.compile(r"\w+_object(_list)?$")
OBJECT_VERBS = ("all_gather", "gather", "broadcast", "scatter", "send", "recv")


def exported(module: Module) -> list[str] | None:
    """The names in a module's `__all__`, if it has one."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


@pytest.mark.parametrize("module", [m for m in modules() if exported(m)], ids=str)
def test_every_exported_name_can_be_imported(module: Module) -> None:
    names = exported(module)
    assert names is not None
    loaded = importlib.import_module(module.name)
    missing = [name for name in names if not hasattr(loaded, name)]
    assert not missing
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # as ruff does
    lazy = getattr(loaded, "_EXPORTS", None)
    if lazy is not None:
        assert set(lazy) == set(names) - {"__version__"}


def test_every_folder_says_what_it_is() -> None:
    missing = [folder for folder in FOLDERS if not (ROOT / folder / "README.md").is_file()]
    assert not missing


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a file could run code that it reads, or starts a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            names = []
        for name in names:
            last = name.rpartition(".")[2]
            imported = isinstance(node, ast.Import | ast.ImportFrom)
            if (
                (imported and name.partition(".")[0] in FORBIDDEN_MODULES)
                or name in FORBIDDEN_CALLS
                or (OBJECT_COLLECTIVE.match(last) and last.startswith(OBJECT_VERBS))
            ):
                yield f"line {getattr(node, 'lineno', 0)}: {name}"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_nothing_read_is_run(module: Module) -> None:
    assert not list(unsafe(module.tree))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "run = exec",
        "import torch\ntorch.load('x')",
        "dist.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "numpy.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_unsafe_code_is_noticed(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_safe_code_is_not() -> None:
    source = "model.eval()\nre.compile('x')\ntorch.compile(f)\nnumpy.load('x', allow_pickle=False)"
    assert not list(unsafe(ast.parse(source)))


def test_no_file_is_longer_than_it_can_be_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
    assert not {str(path): n for path, n in lengths.items() if n > MAX_LINES}


def undocumented(module: Module) -> Iterator[str]:
    """Public definitions of a module without a docstring or with a missing annotation."""
    if not ast.get_docstring(module.tree):
        yield "the module: docstring"
    if any(part.startswith("_") for part in module.name.split(".")):
        return
    for node, owner in public_definitions(module.tree):
        label = (
            f"line {node.lineno}: {owner.name}.{node.name}"
            if owner
            else f"line {node.lineno}: {node.name}"
        )
        if not ast.get_docstring(node) and not (owner and speaks_for_itself(node, owner)):
            yield f"{label}: docstring"
        if not isinstance(node, ast.ClassDef):
            missing = unannotated(node, method=owner is not None)
            yield from (f"{label}: annotation of {name}" for name in missing)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(
    body: ast.Module | ast.ClassDef,
) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Public classes, functions and methods, each with the class that it belongs to."""
    owner = body if isinstance(body, ast.ClassDef) else None
    for node in body.body:
        if not isinstance(node, Definition):
            continue
        if not node.name.startswith("_") or (owner and node.name in CONSTRUCTORS):
            yield node, owner
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_definitions(node)


CONSTRUCTORS = ("__init__", "__call__")


def speaks_for_itself(node: Definition, owner: ast.ClassDef) -> bool:
    """Whether a method needs no docstring: constructors, setters, one-liners, overrides."""
    if isinstance(node, ast.ClassDef):
        return False
    decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    if decorators & {"overload", "setter"}:
        return True
    return node.name in CONSTRUCTORS or len(node.body) == 1 or bool(owner.bases)


def unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> Iterator[str]:
    static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
    arguments = [*node.args.posonlyargs, *node.args.args][int(method and not static) :]
    arguments += node.args.kwonlyargs
    arguments += [each for each in (node.args.vararg, node.args.kwarg) if each is not None]
    yield from (each.arg for each in arguments if each.annotation is None)
    if node.returns is None:
        yield "the result"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_what_is_public_is_annotated_and_documented(module: Module) -> None:
    assert not list(undocumented(module))


def test_missing_documentation_is_noticed() -> None:
    source = '''"""Doc."""
class A:
    """Doc."""
    def f(self, x):
        y = x
        return y
def _g(): ...
def h() -> int: ...
'''
    planted = Module("planaria.core.x", ROOT / "x.py", ast.parse(source))
    assert list(undocumented(planted)) == [
        "line 4: A.f: docstring",
        "line 4: A.f: annotation of x",
        "line 4: A.f: annotation of the result",
        "line 8: h: docstring",
    ]


def test_the_tree_of_errors_is_as_drawn() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"(?P<lead>[ │├└─]*)(?P<name>[A-Z]\w+Error)(?P<says>\s.*)?", line)
        if not found:
            continue
        depth = (len(found["lead"]) - 4) // 4
        path[depth:] = [found["name"]]
        drawn[found["name"]] = path[depth - 1] if depth else ""
        assert found["says"] or not depth, f"say what {found['name']} means"
    real = {
        name: next(
            (base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__), ""
        )
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, Exception)
    }
    assert drawn == real
    assert list(drawn) == list(real), "drawn and defined in the same order"


def test_errors_shadow_no_builtin() -> None:
    assert not {name for name in vars(errors) if name.endswith("Error") and hasattr(builtins, name)}


def canonical(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        canonical(each)
        for each in [*project["dependencies"], *extras["dev"], *extras["bench"], *extras["s3"]]
    } - {"planaria"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert not wanted - {canonical(pin) for pin in pins}


def test_changelog_knows_the_version() -> None:
    assert f"## [{planaria.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
