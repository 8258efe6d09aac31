"""The named points of a save at which faults are injected, in the order they are passed."""

from planaria.core.points import declare

CALL = declare("checkpoint.call", "save() was called, nothing is copied yet")
CALLED = declare("checkpoint.called", "what may change at any time is copied, the rest is queued")
PLAN = declare("checkpoint.plan", "before ranks agree on who writes what")
CAPTURE_BEGIN = declare("checkpoint.capture.begin", "before the first chunk is copied")
CAPTURE_CHUNK = declare("checkpoint.capture.chunk", "before each chunk is copied")
CAPTURE_AUDIT = declare(
    "checkpoint.capture.audit", "all is copied, the source is not yet re-checked"
)
CAPTURE_END = declare("checkpoint.capture.end", "the gate opens next")
WRITE_HEADER = declare("checkpoint.write.header", "before a data file's header is written")
WRITE_CHUNK = declare("checkpoint.write.chunk", "before each chunk is written")
WRITE_END = declare("checkpoint.write.end", "all is written, nothing is synced")
FSYNC_END = declare("checkpoint.fsync.end", "a data file and its folder are synced")
RECORD = declare("checkpoint.record", "before ranks report what they wrote")
MANIFEST_BEGIN = declare("checkpoint.manifest.begin", "rank 0 knows that all data is durable")
MANIFEST_WRITTEN = declare("checkpoint.manifest.written", "the manifest has its temporary name")
MANIFEST_RENAMED = declare("checkpoint.manifest.renamed", "the manifest is in place, not synced")
COMMITTED = declare("checkpoint.committed", "the step is committed, other ranks do not know yet")
RETENTION_BEGIN = declare("checkpoint.retention.begin", "before old steps are removed")
RETENTION_UNLISTED = declare("checkpoint.retention.unlisted", "one has lost its manifest")
RETENTION_END = declare("checkpoint.retention.end", "old steps are removed")

MIRROR_BEGIN = declare("checkpoint.mirror.begin", "before a step is copied to the mirror")
MIRROR_CHUNK = declare("checkpoint.mirror.chunk", "before each chunk is sent to the mirror")
MIRROR_FILE = declare("checkpoint.mirror.file", "a data file is in the mirror")
MIRROR_MANIFEST = declare(
    "checkpoint.mirror.manifest", "all data files are in the mirror, the manifest is not"
)
MIRROR_WRITTEN = declare("checkpoint.mirror.written", "so is the manifest; nobody knows yet")
MIRROR_COMMITTED = declare("checkpoint.mirror.committed", "the manifest was read back there")
MIRROR_UNLISTED = declare(
    "checkpoint.mirror.unlisted", "an old step of the mirror has lost its manifest"
)
MIRROR_END = declare("checkpoint.mirror.end", "old steps of the mirror are removed")

SNAPSHOT_BEGIN = declare("checkpoint.snapshot.begin", "a rank has memory for its image")
SNAPSHOT_CAPTURED = declare("checkpoint.snapshot.captured", "its image is complete, not sealed")
SNAPSHOT_SEALED = declare("checkpoint.snapshot.sealed", "it is sealed, before ranks tell of it")
SNAPSHOT_DESCRIBE = declare("checkpoint.snapshot.describe", "rank 0 knows that all have sealed")
SNAPSHOT_DESCRIBED = declare("checkpoint.snapshot.described", "the nodes do the rest by themselves")
SNAPSHOT_END = declare("checkpoint.snapshot.end", "it is in memory, the caller does not know yet")

#: Every point of a snapshot in memory that its ranks pass, after those of the capture.
SNAPSHOT = [
    *(SNAPSHOT_BEGIN, SNAPSHOT_CAPTURED, SNAPSHOT_SEALED),
    *(SNAPSHOT_DESCRIBE, SNAPSHOT_DESCRIBED, SNAPSHOT_END),
]

HEAL_FILE = declare("checkpoint.heal.file", "before a damaged data file is replaced")
HEAL_MANIFEST = declare("checkpoint.heal.manifest", "a step's files are whole, no manifest says so")
HEAL_WRITTEN = declare("checkpoint.heal.written", "the manifest is in place again, not synced")

#: Every point of a save.
SAVE = [
    *(CALL, CALLED, PLAN, CAPTURE_BEGIN, CAPTURE_CHUNK, CAPTURE_AUDIT, CAPTURE_END),
    *(WRITE_HEADER, WRITE_CHUNK, WRITE_END, FSYNC_END, RECORD),
    *(MANIFEST_BEGIN, MANIFEST_WRITTEN, MANIFEST_RENAMED, COMMITTED),
    *(RETENTION_BEGIN, RETENTION_UNLISTED, RETENTION_END),
]

PRUNE_LOCKED = declare("checkpoint.prune.locked", "planaria prune holds the root's lock")
PRUNE_CHOSEN = declare("checkpoint.prune.chosen", "it knows what goes, nothing is removed yet")
PRUNE_NEXT = declare("checkpoint.prune.next", "before a step is removed; named with each")
PRUNE_REMOVED = declare("checkpoint.prune.removed", "a step is removed; named with each")
PRUNE_SWEPT = declare("checkpoint.prune.swept", "leftovers are removed, the lock is held yet")

#: Every point of `planaria prune`, in order; `RETENTION_UNLISTED` is passed by each removal.
PRUNE = [
    *(PRUNE_LOCKED, PRUNE_CHOSEN, PRUNE_NEXT, RETENTION_UNLISTED, PRUNE_REMOVED, PRUNE_SWEPT),
]

#: Every point of a copy to the mirror.
MIRROR = [
    *(MIRROR_BEGIN, MIRROR_CHUNK, MIRROR_FILE, MIRROR_MANIFEST, MIRROR_WRITTEN),
    *(MIRROR_COMMITTED, MIRROR_UNLISTED, MIRROR_END),
]

#: Every point of the replacement of a damaged step, with `MIRROR_CHUNK` before each chunk.
HEAL = [HEAL_FILE, MIRROR_CHUNK, HEAL_MANIFEST, HEAL_WRITTEN]
