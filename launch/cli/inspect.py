"""``planaria inspect``: what a checkpoint holds, without reading its data."""

import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from planaria.launch import config, output
from planaria.launch.cli import places
from planaria.launch.output import size
from planaria.launch.run_folder import RunFolder


def inspect(
    path: str = typer.Argument(..., help="A run, a checkpoint root (or URL), or one step of it."),
    step: int | None = typer.Option(None, "--step", help="Step; by default the newest one."),
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Show what a checkpoint holds: sizes, dtypes, layout, objects, configuration."""
    from planaria.checkpoint.storage.base import open_storage
    from planaria.checkpoint.storage.root import Root

    place = places.find(path)
    number = places.newest(place.root, step if step is not None else place.step)
    manifest = Root(open_storage(place.root)).manifest(number)
    facts = describe(manifest, tensors=tensors or as_json)
    facts["root"] = place.root
    run = RunFolder(Path(place.root).parent)
    if "://" not in place.root and run.exists():
        facts["configuration"] = asdict(config.load(run.config))
    if as_json:
        output.print_json(facts)
    else:
        _print(facts)
    return 0


def describe(manifest: Any, *, tensors: bool) -> dict[str, Any]:
    """What a manifest says, as JSON values.

    Args:
        manifest: A `planaria.checkpoint.format.manifest.Manifest`.
        tensors: Whether to list every tensor.
    """
    from planaria.checkpoint.storage.names import data_label

    parts: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"tensors": 0, "bytes": 0, "boxes": 0, "dtypes": {}, "writers": set()}
    )
    for name, info in manifest.tensors.items():
        part = parts[name.partition(".")[0]]
        part["tensors"] += 1
        part["bytes"] += info.nbytes
        part["boxes"] += len(info.boxes)
        dtype = info.dtype.name
        part["dtypes"][dtype] = part["dtypes"].get(dtype, 0) + info.nbytes
        part["writers"] |= {b.file for b in info.boxes}
    facts: dict[str, Any] = {
        "step": manifest.step,
        "created": manifest.created,
        "format": manifest.format,
        "world_size": manifest.world_size,
        "bytes": manifest.nbytes,
        "referenced_bytes": manifest.referenced_nbytes,
        "checksum": manifest.checksum,
        "parts": {
            name: {**part, "writers": len(part["writers"])} for name, part in sorted(parts.items())
        },
        "files": [
            {"name": data_label(f), "bytes": f.nbytes, "chunks": len(f.chunk_checksums)}
            for f in manifest.files
        ],
        "aliases": manifest.aliases,
        "objects": manifest.objects,
        "metrics": manifest.metrics,
        "run": manifest.run,
        "nan": manifest.nan_names,
    }
    if tensors:
        facts["tensors"] = {
            name: {
                "dtype": info.dtype.name,
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "nan": info.nan,
                "boxes": [
                    {
                        "offset": list(b.box.offset),
                        "extent": list(b.box.extent),
                        "file": data_label(manifest.files[b.file]),
                    }
                    for b in info.boxes
                ],
            }
            for name, info in sorted(manifest.tensors.items())
        }
    return facts


def _print(facts: dict[str, Any]) -> None:
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["created"]))
    pairs = [
        ("step", f"{facts['step']}, saved {created} by {facts['world_size']} ranks"),
        ("size", _extent(facts)),
        ("root", facts["root"]),
    ]
    if facts["metrics"]:
        pairs.append(("metrics", ", ".join(f"{k} {v}" for k, v in facts["metrics"].items())))
    if facts["aliases"]:
        ties = ", ".join(f"{alias} = {name}" for alias, name in facts["aliases"].items())
        pairs.append(("stored once", ties))
    pairs.append(("NaN", ", ".join(facts["nan"]) or "none"))
    output.print_pairs(pairs)
    print()
    output.print_table(
        ["part", "tensors", "size", "dtypes", "boxes", "files"],
        [
            (
                name,
                part["tensors"],
                size(part["bytes"]),
                ", ".join(f"{d} {size(n)}" for d, n in part["dtypes"].items()),
                part["boxes"],
                part["writers"],
            )
            for name, part in facts["parts"].items()
        ],
        right=(1, 2, 4, 5),
    )
    print()
    output.print_table(
        ["file", "size", "chunks"],
        [(f["name"], size(f["bytes"]), f["chunks"]) for f in facts["files"]],
        right=(1, 2),
    )
    if "tensors" in facts:
        print()
        output.print_table(
            ["tensor", "dtype", "shape", "size", "boxes", "in"],
            [
                (
                    name,
                    t["dtype"] + (" NaN" if t["nan"] else ""),
                    "x".join(map(str, t["shape"])) or "scalar",
                    size(t["bytes"]),
                    len(t["boxes"]),
                    ", ".join(sorted({b["file"] for b in t["boxes"]})),
                )
                for name, t in facts["tensors"].items()
            ],
            right=(3, 4),
        )
    if facts["objects"]:
        print()
        output.print_table(
            ["object", "value"],
            [(name, _cut(value)) for name, value in sorted(facts["objects"].items())],
        )
    for label in ("run", "configuration"):
        if facts.get(label):
            print(f"\n{label}")
            output.print_pairs((f"  {k}", _words(v)) for k, v in facts[label].items())


def _extent(facts: dict[str, Any]) -> str:
    text = f"{size(facts['bytes'])} in {len(facts['files'])} files"
    if not facts["referenced_bytes"]:
        return text
    own = sum("/" not in f["name"] for f in facts["files"])
    return (
        f"{size(facts['bytes'])} in {own} files of its own; {size(facts['referenced_bytes'])} that "
        f"had not changed in {len(facts['files']) - own} of earlier steps"
    )


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return _cut(value)


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
