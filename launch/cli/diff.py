"""``planaria diff``: which tensors and values differ between two checkpoints, and by how much."""

import math
from typing import TYPE_CHECKING, Any

import typer

from planaria.errors import ConfigError
from planaria.launch import exit_codes, output
from planaria.launch.cli import places
from planaria.launch.output import size

if TYPE_CHECKING:
    from planaria.checkpoint.compare import Comparison, TensorDifference
    from planaria.checkpoint.reader import Checkpoint


def diff(
    a: str = typer.Argument(..., help="A run, a checkpoint root (or URL), or one step of it."),
    b: str | None = typer.Argument(None, help="Another; by default the same.", show_default=False),
    step: list[int] | None = typer.Option(
        None, "--step", help="Step of both; given twice, of A and of B.", show_default=False
    ),
    only: list[str] | None = typer.Option(
        None, "--only", help="Names, prefixes or patterns to look at.", show_default=False
    ),
    top: int = typer.Option(30, "--top", help="Rows to print; JSON has all."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Compare two checkpoints bit by bit: tensors, their shapes and dtypes, small objects.

    Without steps, the newest of A and of B, or the two newest of A. Any two layouts can be
    compared; both are read in pieces, and verified.

    Exit codes: 0 equal, 4 different, 2 wrong command line, 3 corrupt.
    """
    from planaria.checkpoint.compare import compare
    from planaria.checkpoint.restore import name_filter

    first, second = _open(a, b, step or [])
    found = compare(first, second, name_filter(only or None))
    if only and not found.compared and found.equal:
        raise ConfigError(f"--only {' '.join(only)}: neither checkpoint has such a name")
    if as_json:
        output.print_json({"a": _where(first), "b": _where(second), **_finite(found.to_json())})
    else:
        _print(first, second, found, top)
    return exit_codes.DONE if found.equal else exit_codes.FOUND


def _open(a: str, b: str | None, steps: list[int]) -> "tuple[Checkpoint, Checkpoint]":
    """The two checkpoints that a command line means."""
    from planaria.checkpoint.reader import open_checkpoint, open_root

    if len(steps) > 2:
        raise ConfigError("--step can be given twice at most: for A and for B")
    one = places.find(a)
    if b is None:
        named = [] if one.step is None else [one.step]
        if not named and not steps:
            named = open_root(one.root).steps()[-2:]
        pair = [*named, *steps]
        if len(pair) > 2:
            raise ConfigError(f"{a} names its step already: give --step once, for the other one")
        if not steps and len(pair) < 2:
            raise ConfigError(f"{a} is one checkpoint: name another one to compare it with")
        if len(pair) < 2:
            raise ConfigError(f"--step {steps[0]}: give --step a second time, or another path")
        return open_checkpoint(one.root, pair[0]), open_checkpoint(one.root, pair[1])
    other = places.find(b)
    of_a, of_b = one.step, other.step
    if len(steps) > (of_a is None) + (of_b is None):
        raise ConfigError("--step is for the paths that name no step, and there are fewer of them")
    if steps:
        of_a = steps[0] if of_a is None else of_a
        of_b = steps[-1] if of_b is None else of_b
    return open_checkpoint(one.root, of_a), open_checkpoint(other.root, of_b)


def _where(checkpoint: "Checkpoint") -> dict[str, Any]:
    return {"root": checkpoint.url, "step": checkpoint.step}


def _finite(value: Any) -> Any:
    """The value with infinities as text, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _print(a: "Checkpoint", b: "Checkpoint", found: "Comparison", top: int) -> None:
    output.print_pairs([("A", f"step {a.step} of {a.url}"), ("B", f"step {b.step} of {b.url}")])
    told = f"{found.compared} tensors on both sides, {size(found.nbytes)} compared"
    if found.equal:
        print(f"equal, bit by bit: {told}")
        return
    print(f"{told}; {len(found.tensors)} differ, and {len(found.objects)} values of objects")
    if found.tensors:
        worst_first = sorted(found.tensors, key=lambda t: (t.what == "values", -t.max_rel, t.name))
        print()
        output.print_table(
            ["tensor", "what", "dtype", "shape", "differ", "max abs", "max rel", "max ULP", "at"],
            [_row(t) for t in worst_first[:top]],
            right=(4, 5, 6, 7),
        )
        _left_out(len(found.tensors) - top)
    if found.objects:
        print()
        output.print_table(
            ["object", "A", "B"],
            [(o.path, _cut(o.a, o.what == "only in B"), _cut(o.b, o.what == "only in A"))
             for o in found.objects[:top]],
        )  # fmt: skip
        _left_out(len(found.objects) - top)


def _row(t: "TensorDifference") -> tuple[str, ...]:
    dtype, shape = _both(t.dtypes), _both(tuple(map(_shape, t.shapes)))
    if t.differing is None:
        return (t.name, t.what, dtype, shape, "", "", "", "", "")
    what = f"values, {t.nan} NaN" if t.nan else "values"
    share = f"{t.differing} of {t.elements}"
    if t.worst is None:
        return (t.name, what, dtype, shape, share, "", "", "", "")
    ulp = "" if t.max_ulp is None else str(t.max_ulp)
    at = ",".join(map(str, t.worst))
    return (t.name, what, dtype, shape, share, f"{t.max_abs:.3g}", f"{t.max_rel:.3g}", ulp, at)


def _both(pair: tuple[Any, Any]) -> str:
    known = [str(v) for v in pair if v is not None]
    return " / ".join(dict.fromkeys(known))


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape)) or "scalar"


def _cut(value: Any, missing: bool) -> str:
    text = "-" if missing else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _left_out(count: int) -> None:
    if count > 0:
        print(f"... and {count} more (--top)")
