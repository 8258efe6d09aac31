"""pytest plug-in: faults on purpose in tests of any trainer, and equality with an undisturbed run.

::

    @pytest.mark.faults(kill=[(1, 5)], world=4)
    def test_a_lost_rank_changes_nothing(elastic_run):
        elastic_run("train.py", "--steps", "20")

The trainer calls ``planaria.elastic.faults.record(step, loss)`` on every rank once a step is done.
Nothing here loads torch.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from planaria.errors import ConfigError

if TYPE_CHECKING:
    from planaria.elastic.faults import Fault, Report

_HELP = (
    "faults(kill=[(rank, step)], stop=[(rank, step, seconds)], slow=[(rank, step, seconds)], "
    "partition=[(ranks, step, seconds)], faults=[Fault(...)], mtbf_s=None, seed=0, horizon_s=30, "
    "world=2, launcher='torchrun', again=0, deadline_s=120): what goes wrong in the `elastic_run` "
    "of this test"
)
_LAUNCHERS = ("torchrun", "planaria", None)
_OUTPUT_LINES = 30

#: Command -> its undisturbed run, in this process.
_references: dict[tuple[Any, ...], "Report"] = {}


@dataclass(frozen=True)
class _Plan:
    """The arguments of the marker; see `_HELP`."""

    kill: Sequence[tuple[int, int]] = ()
    stop: Sequence[tuple[int, int, float]] = ()
    slow: Sequence[tuple[int, int, float]] = ()
    partition: Sequence[tuple[Sequence[int], int, float]] = ()
    faults: "Sequence[Fault]" = ()
    mtbf_s: float | None = None
    seed: int = 0
    horizon_s: float = 30.0
    world: int = 2
    launcher: str | None = "torchrun"
    again: int = 0
    deadline_s: float = 120.0

    def schedule(self) -> "list[Fault]":
        from planaria.elastic.faults.schedule import RECORDED, Fault, random_schedule

        made = [Fault("kill", (rank,), step=step, point=RECORDED) for rank, step in self.kill]
        made += [Fault("stop", (rank,), step=step, for_s=s) for rank, step, s in self.stop]
        made += [Fault("slow", (rank,), step=step, for_s=s) for rank, step, s in self.slow]
        made += [
            Fault("partition", tuple(ranks), step=step, for_s=s)
            for ranks, step, s in self.partition
        ]
        if self.mtbf_s is not None:
            made += random_schedule(
                self.seed, mtbf_s=self.mtbf_s, horizon_s=self.horizon_s, world=self.world
            )
        return [*made, *self.faults]


@dataclass(frozen=True)
class ElasticRun:
    """A run with faults, beside the undisturbed one.

    Attributes:
        report: Of the run with faults.
        reference: Of the undisturbed one, which is made once a command.
    """

    report: "Report"
    reference: "Report"

    def assert_same(self) -> None:
        """Asserts that both came to their end, that all faults happened, and that losses are equal.

        Raises:
            AssertionError: Something of it is not so.
        """
        from planaria.elastic.faults import assert_same

        __tracebackhide__ = True
        for name, report in (("undisturbed run", self.reference), ("run", self.report)):
            if report.outcome != "done":
                printed = "\n".join(report.output.splitlines()[-_OUTPUT_LINES:])
                raise AssertionError(
                    f"the {name} did not come to its end: {report.outcome}, exit codes "
                    f"{report.codes}; the last it printed:\n{printed}"
                )
        if not self.reference.trajectory.records:
            raise AssertionError(
                "no step was recorded: call planaria.elastic.faults.record(step, loss) on every "
                "rank of the trainer once a step is done"
            )
        if self.report.missed:
            missed = "\n  ".join(event.text for event in self.report.missed)
            raise AssertionError(f"faults that did not happen, so nothing was tested:\n  {missed}")
        assert_same(self.report.trajectory, self.reference.trajectory)


class ElasticRunner:
    """What the fixture `elastic_run` is: called with a command, it runs it twice and compares."""

    def __init__(self, plan: _Plan, folder: Path, node: pytest.Item) -> None:
        self._plan, self._folder, self._node = plan, folder, node
        self._count = 0

    def __call__(
        self,
        *command: str | os.PathLike[str],
        env: dict[str, str] | None = None,
        check: bool = True,
    ) -> ElasticRun:
        """Runs a trainer undisturbed and with the faults of the test's marker.

        Each run has an empty folder of its own as its working folder.

        Args:
            *command: A script with its arguments, for the marker's launcher, which gives it `world`
                ranks; with ``launcher=None`` a whole command.
            env: More environment.
            check: Whether to call `ElasticRun.assert_same`.

        Raises:
            AssertionError: The runs are not equal bit by bit, or one did not come to its end.
            ConfigError: The command cannot be started.
        """
        __tracebackhide__ = True
        parts = [os.fspath(part) for part in command]
        if not parts:
            raise ConfigError("elastic_run needs a script, or a command")
        if self._plan.launcher is not None:
            parts[0] = str(Path(parts[0]).absolute())
        key = (*parts, *map(_version, parts), self._plan.launcher, self._plan.world,
               *sorted(_environment(env).items()))  # fmt: skip
        reference = _references.get(key)
        if reference is None:
            reference = self._run("undisturbed", parts, [], env)
            if reference.outcome == "done":  # else the next test may be luckier
                _references[key] = reference
        report = self._run("with faults", parts, self._plan.schedule(), env)
        done = ElasticRun(report, reference)
        if check:
            done.assert_same()
        return done

    def _run(
        self, name: str, parts: list[str], faults: "Sequence[Fault]", env: dict[str, str] | None
    ) -> "Report":
        from planaria.elastic.faults import carry_out

        self._count += 1
        folder = self._folder / f"run-{self._count}"
        work = folder / "work"
        work.mkdir(parents=True)
        report = carry_out(
            self._launched(parts, len(faults)),
            faults,
            folder=folder / "drill",
            cwd=work,
            deadline_s=self._plan.deadline_s,
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **(env or {})},
            again=self._plan.again,
            seed=self._plan.seed,
        )
        self._node.add_report_section("call", f"run {name}", "\n".join(report.lines()))
        return report

    def _launched(self, parts: list[str], faults: int) -> list[str]:
        world = str(self._plan.world)
        if self._plan.launcher == "torchrun":
            return [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                world, "--max-restarts", str(faults), "--monitor-interval", "0.1", *parts,
            ]  # fmt: skip
        if self._plan.launcher == "planaria":
            planaria = [sys.executable, "-m", "planaria.launch.cli"]
            return [*planaria, "run", "-n", world, "--run", "run", "--", *parts]
        return parts


def _version(part: str) -> tuple[int, int] | None:
    """What tells a file from what was there under its name before; None for any other word."""
    try:
        stat = os.stat(part)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    """What a trainer may go by: all of it, as tests change it, too."""
    return {k: v for k, v in {**os.environ, **(more or {})}.items() if k != "PYTEST_CURRENT_TEST"}


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line("markers", _HELP)


@pytest.fixture
def elastic_run(request: pytest.FixtureRequest, tmp_path: Path) -> ElasticRunner:
    """Runs a trainer with the faults of the test's marker, and compares it with an undisturbed run.

    See `ElasticRunner.__call__`; without the marker nothing goes wrong, on two ranks.
    """
    marker = request.node.get_closest_marker("faults")
    if marker is not None and marker.args:
        raise ConfigError(f"the marker takes arguments by name only: {_HELP}")
    try:
        plan = _Plan(**(marker.kwargs if marker is not None else {}))
    except TypeError as error:
        raise ConfigError(f"{error}; the marker is {_HELP}") from error
    if plan.launcher not in _LAUNCHERS:
        raise ConfigError(f"launcher={plan.launcher!r}: give one of {_LAUNCHERS}")
    return ElasticRunner(plan, tmp_path / "elastic", request.node)
