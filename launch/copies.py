"""What telemetry says of a run's second copy: how much there is of it, and how far it is behind."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planaria.launch.intervals import length, union
from planaria.launch.output import size

_FAILED = ("checkpoint.mirror_retry", "checkpoint.mirror_failed")
_BEGUN = "checkpoint.mirror_begun"


@dataclass(frozen=True)
class Copies:
    """The copies of a run's checkpoints in its mirror.

    Attributes:
        committed: Checkpoints that were committed.
        copied: Of these, those that were copied.
        nbytes: Bytes of all copies.
        seconds: Seconds in which something was being copied.
        behind_s: Longest time from a commit to the end of its copy, in seconds; None without one.
        behind: The newest checkpoint that is committed and not copied, None where the newest is;
            an older one that a newer one has overtaken does not count.
        failed: Tries that failed.
    """

    committed: int
    copied: int
    nbytes: int
    seconds: float
    behind_s: float | None
    behind: int | None
    failed: int

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dict(vars(self))

    def line(self) -> str:
        """All of it, for people."""
        text = f"mirror: {self.copied} of {self.committed} checkpoints copied"
        if self.copied:
            text += f", {size(self.nbytes)}"
        if self.copied and self.seconds > 0:
            text += f" at {self.nbytes / self.seconds / 1e6:.3g} MB/s"
        if self.behind_s is not None:
            text += f", each within {self.behind_s:.1f} s of its commit"
        if self.failed:
            text += f"; {self.failed} {'try' if self.failed == 1 else 'tries'} failed"
        if self.behind is not None:
            text += f"; step {self.behind}, the newest, is not copied yet"
        return text


def copies_of(records: Iterable[Mapping[str, Any]]) -> Copies | None:
    """Adds up what rank 0 told of its mirror; None where it had none.

    Args:
        records: Telemetry of all ranks, in order of time.
    """
    commits: dict[int, float] = {}
    copied: dict[int, float] = {}
    spans: list[tuple[float, float]] = []
    nbytes = failed = 0
    behind: list[float] = []
    mirrored = False
    ended: list[tuple[float, int, bool, int]] = []
    for record in records:
        name, kind = record.get("name"), record.get("kind")
        mirrored = mirrored or name in (*_FAILED, _BEGUN, "checkpoint.mirror")
        failed += name in _FAILED
        if kind != "span" or name not in ("checkpoint.persist", "checkpoint.mirror"):
            continue
        at = record["t"] + record["dur"]
        if name == "checkpoint.mirror":
            spans.append((record["t"], at))
            if "error" not in record:
                ended.append((at, record["step"], True, int(record.get("bytes", 0))))
        elif record.get("rank") == 0 and record.get("ok"):
            ended.append((at, record["step"], False, 0))
    for at, step, is_copy, count in sorted(ended):
        if not is_copy:
            commits[step] = at
            copied.pop(step, None)  # it was saved anew
            continue
        copied[step] = at
        nbytes += count
        if step in commits:
            behind.append(at - commits[step])
    if not mirrored:
        return None
    newest = max(commits, key=lambda step: commits[step], default=None)
    return Copies(
        committed=len(commits),
        copied=len(copied.keys() & commits.keys()),
        nbytes=nbytes,
        seconds=length(union(spans)),
        behind_s=max(behind, default=None),
        behind=None if newest is None or newest in copied else newest,
        failed=failed,
    )
