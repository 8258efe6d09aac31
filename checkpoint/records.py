"""What ranks tell rank 0 of a save, and the manifest that it makes of that."""

import time
from collections.abc import Sequence
from typing import Any

from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.objects import merge_objects
from planaria.checkpoint.unchanged import gather, to_record


def make_record(job: SaveJob, file: FileInfo | None, error: Exception | None) -> dict[str, Any]:
    """What a rank tells of its part.

    Args:
        job: The save.
        file: What it wrote; None if nothing.
        error: Why it failed.
    """
    return {
        "error": None if error is None else str(error) or repr(error),
        "attempt": job.attempt,
        "file": None if file is None else file.to_json(),
        "objects": job.objects,
        "nan": job.handle.nan_names,
        "unchanged": None if job.packer is None or error is not None else to_record(job.packer),
    }


def failures(job: SaveJob, records: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Which ranks have failed, and why."""
    failed = [(r, rec["error"]) for r, rec in enumerate(records) if rec["error"]]
    return failed + [
        (r, "is at another save") for r, rec in enumerate(records) if rec["attempt"] != job.attempt
    ]


def make_manifest(job: SaveJob, records: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of a step of which all ranks have told what they wrote."""
    files, file_of_rank = [], {}
    for rank, record in enumerate(records):
        if record["file"] is not None:
            file_of_rank[rank] = len(files)
            files.append(FileInfo.from_json(record["file"]))
    nan_names = {name for record in records for name in record["nan"]}
    assert job.own is not None
    digests: dict[str, list[str]] = {}
    if job.packer is None:
        tensors, as_json = job.own.tensors(file_of_rank, nan_names)
    else:
        own = [files[file_of_rank[r]] if r in file_of_rank else None for r in range(len(records))]
        told = [record["unchanged"] for record in records]
        found = gather(job.own.plan, own, told, nan_names)
        files, tensors, digests, as_json = found.files, found.tensors, found.digests, None
    manifest = Manifest(
        step=job.step,
        attempt=job.attempt,
        created=time.time(),
        world_size=len(records),
        files=files,
        tensors=tensors,
        aliases=job.own.plan.aliases,
        objects=merge_objects([record["objects"] for record in records]),
        metrics=job.metrics,
        run=job.run,
        digests=digests,
    )
    manifest.tensors_json = as_json
    return manifest
