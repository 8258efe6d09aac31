"""What a run came to, added up from its folder: steps, losses, goodput, checkpoints."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from planaria import telemetry
from planaria.errors import ConfigError
from planaria.launch import config, elastic_events, metrics
from planaria.launch.elastic_events import Transition
from planaria.launch.output import size
from planaria.launch.run_folder import RunFolder

#: So many changes of the ranks are shown, the last ones.
_SHOWN = 8


@dataclass(frozen=True)
class Summary:
    """The figures of a run, over all its attempts.

    Attributes:
        state: running, done, preempted or failed.
        step: Steps that count.
        steps: Steps asked for; None for a script of the user's, which knows its own.
        first_loss: Loss of the first step, None before it.
        last_loss: Loss of the last step that counts.
        attempts: Starts of the ranks.
        wall_s: Seconds in which a launcher worked on the run.
        useful_s: Seconds in steps that count.
        goodput: `useful_s` over `wall_s`.
        repeated_steps: Steps that were lost and taken again.
        identical_repeats: How many of them had the same loss, bit by bit.
        tokens_per_s: Tokens of a step over its seconds, on average over the steps that count.
        checkpoints: Checkpoints committed in all attempts.
        stall_s: Seconds that training waited for one checkpoint (call and gate), on average, on
            the rank that waited longest; None without telemetry.
        bytes_written: Bytes of all checkpoints.
        transitions: Changes of the ranks that an elastic session went through.
        reference: Another run whose losses these are compared with, None for none.
        compared: Steps that both have.
        identical: How many of them have the same loss, bit by bit.
        where: The run's folder.
    """

    state: str
    step: int
    steps: int | None
    first_loss: float | None
    last_loss: float | None
    attempts: int
    wall_s: float
    useful_s: float
    goodput: float
    repeated_steps: int
    identical_repeats: int
    tokens_per_s: float
    checkpoints: int
    stall_s: float | None
    bytes_written: int
    transitions: list[Transition]
    reference: str | None
    compared: int
    identical: int
    where: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each figure, for people."""
        state = self.state
        if self.steps is not None:
            state += f" at step {self.step} of {self.steps}"
        rows = [("state", state)]
        if self.first_loss is not None and self.last_loss is not None:
            rows.append(("loss", f"{self.first_loss:.4f} -> {self.last_loss:.4f}"))
        if self.repeated_steps:
            rows.append(
                (
                    "repeated steps",
                    f"{self.repeated_steps}, of which {self.identical_repeats} had bit-identical "
                    "losses",
                )
            )
        rows += [("ranks", _describe(change)) for change in self.transitions[-_SHOWN:]]
        if self.reference is not None:
            rows.append(
                (
                    "reference",
                    f"{self.identical} of {self.compared} losses are bit-identical to those of "
                    f"{self.reference}",
                )
            )
        if self.useful_s:
            rows.append(
                (
                    "goodput",
                    f"{self.goodput:.1%} ({self.useful_s:.1f} s of steps that count in "
                    f"{self.wall_s:.1f} s over {self.attempts} "
                    f"{'attempt' if self.attempts == 1 else 'attempts'})",
                )
            )
            rows.append(("speed", f"{self.tokens_per_s:,.0f} tokens/s"))
        if self.checkpoints:
            stall = "" if self.stall_s is None else f", {self.stall_s * 1e3:.1f} ms of stall each"
            rows.append(
                ("checkpoints", f"{self.checkpoints}, {size(self.bytes_written)} in all{stall}")
            )
        rows.append(("folder", self.where))
        return rows


def summarise(folder: RunFolder, reference: RunFolder | None = None) -> Summary:
    """Adds a run up.

    Args:
        folder: The run's.
        reference: That of a run to compare the losses with, bit by bit.
    """
    status = folder.read_status()
    records = metrics.read(folder.metrics)
    kept = metrics.kept(records)
    again, same = metrics.repeats(records)
    now = time.time()
    wall = sum((a.ended or now) - a.started for a in status.attempts)
    useful = sum(record.seconds for record in kept.values())
    try:
        saved = _checkpoints(telemetry.read(folder.telemetry))
    except ConfigError:
        saved = (0, None, 0)
    losses = list(kept.values())
    compared, identical = metrics.equal_losses(
        kept, {} if reference is None else metrics.kept(metrics.read(reference.metrics))
    )
    return Summary(
        state=status.state,
        step=max(kept, default=status.step),
        steps=None if config.load(folder.config).script is not None else status.steps,
        first_loss=losses[0].loss if losses else None,
        last_loss=losses[-1].loss if losses else None,
        attempts=len(status.attempts),
        wall_s=wall,
        useful_s=useful,
        goodput=useful / wall if wall else 0.0,
        repeated_steps=again,
        identical_repeats=same,
        tokens_per_s=sum(r.tokens for r in losses) / useful if useful else 0.0,
        checkpoints=saved[0],
        stall_s=saved[1],
        bytes_written=saved[2],
        transitions=elastic_events.transitions(elastic_events.read(folder.elastic), records),
        reference=None if reference is None else str(reference.path),
        compared=compared,
        identical=identical,
        where=str(folder.path),
    )


def _describe(change: Transition) -> str:
    """One change of the ranks, for people."""
    what = [f"{verb} {', '.join(map(str, members))}"
            for verb, members in (("lost", change.lost), ("joined by", change.joined))
            if members]  # fmt: skip
    noun = "rank" if change.world_size == 1 else "ranks"
    text = f"{' and '.join(what)} after step {change.step}, went on with {change.world_size} {noun}"
    if change.agreed_s is not None:
        text += f"; agreed within {change.agreed_s * 1e3:.0f} ms"
    return text if change.gap_s is None else f"{text}; gap {change.gap_s * 1e3:.0f} ms"


def _checkpoints(records: Iterable[dict[str, Any]]) -> tuple[int, float | None, int]:
    """Commits, seconds of stall for each of them, bytes written."""
    stalls: dict[int, float] = defaultdict(float)
    commits = written = 0
    for record in records:
        name = record.get("name")
        if name in ("checkpoint.call", "checkpoint.gate"):
            stalls[record.get("rank", 0)] += record.get("dur", 0.0)
        elif name == "checkpoint.persist" and record.get("ok") and record.get("rank") == 0:
            commits += 1
        elif name == "checkpoint.bytes":
            written += int(record.get("value", 0))
    stall = max(stalls.values()) / commits if stalls and commits else None
    return commits, stall, written
