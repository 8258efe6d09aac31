"""``planaria verify``: reads every byte of a checkpoint and compares it with what was written."""

import time
from typing import TYPE_CHECKING, Any

import typer

from planaria.errors import NotCommittedError, StorageError
from planaria.launch import exit_codes, output
from planaria.launch.cli import places
from planaria.launch.output import size

if TYPE_CHECKING:
    from planaria.checkpoint.storage.root import Root


def verify(
    path: str = typer.Argument(..., help="A run, a checkpoint root (or URL), or one step of it."),
    step: int | None = typer.Option(None, "--step", help="Step; by default every committed one."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Read every byte of a run's checkpoints and compare it with what was written.

    Names the file, chunk and tensors of what is bad, and exits 3.
    """
    from planaria.checkpoint.reader import open_root

    place = places.find(path)
    root = open_root(place.root)
    wanted = step if step is not None else place.step
    steps = [wanted] if wanted is not None else root.steps()
    if not steps:
        raise NotCommittedError(f"{place.root} holds no committed checkpoint")
    results = []
    for number in steps:
        try:
            result = check(root, number)
        except NotCommittedError:
            if wanted is not None:
                raise
            continue  # removed since it was listed, by a job that goes on
        results.append(result)
        if not as_json:
            _print(result)
    if as_json:
        output.print_json({"root": place.root, "steps": results})
    good = all(not result["problems"] for result in results)
    return exit_codes.DONE if good else exit_codes.CORRUPT


def check(root: "Root", step: int) -> dict[str, Any]:
    """Verifies one step.

    Raises:
        NotCommittedError: There is no such step, or none any more.
    """
    from planaria.checkpoint.reader import Checkpoint

    began = time.perf_counter()
    result: dict[str, Any] = {"step": step, "bytes": 0, "tensors": 0, "problems": []}
    try:
        checkpoint = Checkpoint(root, root.manifest(step))
        manifest = checkpoint.manifest
        result["bytes"] = manifest.nbytes + manifest.referenced_nbytes
        result["tensors"] = len(checkpoint.manifest.tensors)
        problems = checkpoint.verify()
        if problems and not checkpoint.is_current():
            return check(root, step)  # removed meanwhile, or saved anew
        result["problems"] = [
            {"file": p.file, "chunk": p.chunk, "tensors": p.tensors, "what": p.what, "text": str(p)}
            for p in problems
        ]
    except NotCommittedError:
        raise
    except StorageError as error:
        result["problems"] = [
            {
                "file": "manifest.json",
                "chunk": None,
                "tensors": [],
                "what": "cannot be used",
                "text": str(error),
            }
        ]
    result["seconds"] = time.perf_counter() - began
    return result


def _print(result: dict[str, Any]) -> None:
    if not result["problems"]:
        print(
            f"step {result['step']}: good, {result['tensors']} tensors, {size(result['bytes'])}, "
            f"every byte as written ({result['seconds']:.2f} s)"
        )
        return
    print(f"step {result['step']}: BAD")
    for problem in result["problems"]:
        print(f"  {problem['text']}")
