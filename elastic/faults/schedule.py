"""What goes wrong, when, and to whom: faults, and schedules drawn from a seed."""

import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from planaria.core import points
from planaria.errors import ConfigError

#: Kind -> what it means.
KINDS: dict[str, str] = {
    "kill": "SIGKILL to the ranks",
    "terminate": "SIGTERM to the ranks, as before a preemption",
    "stop": "SIGSTOP to the ranks, SIGCONT after `for_s`",
    "slow": "the ranks get the share `share` of their time for `for_s`",
    "partition": "nothing arrives between the ranks and all others for `for_s`",
    "store_loss": "connections of the ranks to the job's store are cut, for `for_s`",
    "corrupt_memory": "a byte of a mapping that matches `target` is changed in each rank",
    "corrupt_file": "a byte of the newest file that matches `target` is changed",
    "disk_full": "writes fail with ENOSPC at the point, in the ranks",
}
#: Kinds that need a fault point: what they do cannot be done from outside.
INSIDE = ("disk_full",)
#: Kinds that may be done at a fault point, in the rank itself, at the very place.
_AT_POINTS = {"kill": "kill", "stop": "stop", "disk_full": "enospc"}
#: Kinds that last.
LASTING = ("stop", "slow", "partition", "store_loss")

#: Where :func:`planaria.elastic.faults.record` has written a step down.
RECORDED = "elastic.faults.recorded"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    It happens once: at a fault point inside a rank (`point`, optionally at a `step`), or from
    outside, after `at_s` seconds of training or once `step` was recorded.

    Attributes:
        kind: One of `KINDS`.
        ranks: Whom it hits, by the `RANK` of their environment; none: all.
        step: When a rank has recorded this step, or the step that the point is passed.
        at_s: Seconds of training since the first recorded step. From a fault to the next new step
            they stand still, unless the runner is told otherwise.
        point: Pattern over fault points; the fault is then armed inside the ranks.
        for_s: How long it lasts, for the kinds that do; infinity: until the end.
        share: For `slow`, from 0 to 1: the share of the time that the ranks run.
        target: For `corrupt_file` a pattern below the run's folder, for `corrupt_memory` a pattern
            over the names of mappings (as `/memfd:*`).
    """

    kind: str
    ranks: tuple[int, ...] = ()
    step: int | None = None
    at_s: float | None = None
    point: str = ""
    for_s: float = 0.0
    share: float = 0.2
    target: str = ""

    def __post_init__(self) -> None:
        wrong = self._wrong()
        if wrong:
            raise ConfigError(f"fault {self.kind!r}: {wrong}")

    def _wrong(self) -> str | None:
        if self.kind not in KINDS:
            return f"there is no such kind; there are {', '.join(KINDS)}"
        if not all(type(n) is int and n >= 0 for n in (*self.ranks, self.step or 0)):
            return f"ranks and step have to be whole numbers, not {self.ranks} and {self.step!r}"
        if not all(math.isfinite(x) for x in (self.at_s or 0, self.share)) or math.isnan(
            self.for_s
        ):
            return "at_s and share have to be numbers, and for_s one, or infinity"
        if self.point:
            if self.kind not in _AT_POINTS:
                return f"cannot be armed at a point; {', '.join(_AT_POINTS)} can"
            if self.at_s is not None:
                return "give at_s or a point, not both"
            if self.kind == "stop" and math.isfinite(self.for_s):
                return "at a point it is not ended; give for_s=inf, or a step without a point"
        elif self.kind in INSIDE:
            return "needs a fault point"
        elif (self.step is None) == (self.at_s is None):
            return "give a step or at_s (or a point)"
        if self.kind in LASTING and not self.for_s > 0:
            return "give for_s, how many seconds it lasts"
        if self.kind.startswith("corrupt") and not self.target:
            return "give a target"
        if not 0 < self.share <= 1 or (self.at_s or 0) < 0 or (self.step or 0) < 0:
            return "share must be in (0, 1], at_s and step >= 0"
        if self.kind == "partition" and not self.ranks:
            return "give the ranks of one side"
        return None

    def clauses(self) -> list[str]:
        """The fault in the grammar of `planaria.core.points`; none if it is done from outside."""
        if not self.point:
            return []
        step = [] if self.step is None else [f"step={self.step}"]
        ranks = [[f"rank={rank}"] for rank in self.ranks] or [[]]
        head = f"{_AT_POINTS[self.kind]}@{self.point}"
        return [f"{head}:{','.join(r + step)}".rstrip(":") for r in ranks]

    def __str__(self) -> str:
        whom = f" rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        when = "" if self.step is None else f" at step {self.step}"
        when += "" if self.at_s is None else f" after {self.at_s:.2f} s"
        where = f" in {self.point}" if self.point else ""
        long = f" for {self.for_s:g} s" if self.kind in LASTING else ""
        return f"{self.kind}{whom}{when}{where}{long}" + (f" of {self.target}" * bool(self.target))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads a fault back from JSON.

        Raises:
            ConfigError: It is none.
        """
        try:
            values = dict(data)
            if values.get("for_s") == "inf":
                values["for_s"] = math.inf
            return cls(**{**values, "ranks": tuple(values.get("ranks", ()))})
        except TypeError as error:
            raise ConfigError(f"not a fault: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The fault as a JSON object."""
        for_s = self.for_s if math.isfinite(self.for_s) else "inf"
        return {**asdict(self), "ranks": list(self.ranks), "for_s": for_s}


def armed_inside(faults: Sequence[Fault], more: str = "") -> str:
    """The value of ``PLANARIA_FAULTS`` that arms those of the faults that happen at points.

    Args:
        faults: All of a schedule.
        more: What the variable holds already.

    Raises:
        ConfigError: A pattern over points is malformed.
    """
    spec = ";".join([*filter(None, [more]), *(c for fault in faults for c in fault.clauses())])
    points.parse(spec)
    return spec


def random_schedule(
    seed: int,
    *,
    mtbf_s: float,
    horizon_s: float,
    world: int,
    kinds: Collection[str] = ("kill",),
    spare: Collection[int] = (),
    lasting_s: float = 2.0,
    targets: Mapping[str, str] | None = None,
) -> list[Fault]:
    """Draws faults with exponentially distributed times between them: the same for the same seed.

    Args:
        seed: What it is drawn from.
        mtbf_s: Mean seconds of training between two faults of the whole job.
        horizon_s: Until when, in seconds of training.
        world: Number of ranks.
        kinds: What may happen, each equally often.
        spare: Ranks that nothing happens to.
        lasting_s: Mean seconds that those faults last that do.
        targets: For the kinds that have one.

    Raises:
        ConfigError: A number or kind makes no sense, or nobody is left to hit.
    """
    chosen, victims = sorted(set(kinds)), sorted(set(range(world)) - set(spare))
    unknown = [kind for kind in chosen if kind not in KINDS or kind in INSIDE]
    if unknown or not chosen:
        outside = [kind for kind in KINDS if kind not in INSIDE]
        raise ConfigError(f"kinds {unknown or chosen}: choose from {', '.join(outside)}")
    if not (all(0 < s < math.inf for s in (mtbf_s, horizon_s, lasting_s)) and victims):
        raise ConfigError(
            "mtbf_s, horizon_s and lasting_s must be numbers > 0, and some rank not spared"
        )
    drawn, t, faults = random.Random(seed), 0.0, list[Fault]()
    while True:
        # Every draw is made for every fault, so that one choice does not shift all later ones.
        t += drawn.expovariate(1 / mtbf_s)
        kind, rank = drawn.choice(chosen), drawn.choice(victims)
        long = 0.25 * lasting_s + drawn.expovariate(1 / (0.75 * lasting_s))
        if t >= horizon_s:
            return faults
        faults.append(
            Fault(
                kind,
                (rank,),
                at_s=round(t, 3),
                for_s=round(long, 3) if kind in LASTING else 0.0,
                target=(targets or {}).get(kind, ""),
            )
        )


def dump(faults: Sequence[Fault]) -> str:
    """A schedule as JSON text."""
    return json.dumps([fault.to_json() for fault in faults], indent=2)


def load(text: str) -> list[Fault]:
    """Reads a schedule from JSON text.

    Raises:
        ConfigError: It is none.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ConfigError("not a list of faults")
        return [Fault.from_json(each) for each in found]
    except ValueError as error:
        raise ConfigError(f"not a schedule of faults: {error}") from error
