"""The plug-in as a maintainer of another trainer would use it, in a pytest of its own."""

from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

from planaria._pytest import ElasticRunner, _Plan
from planaria.elastic.faults import Report

pytest_plugins = ["pytester"]

#: `drill_job.py` starts its own ranks, and again those that are killed.
TESTS = """
import sys, pytest

def command(*more):
    return [sys.executable, {job!r}, "30", "2", ".", *more]

@pytest.mark.faults(kill=[(1, 5)], stop=[(0, 3, 0.2)], launcher=None)
def test_equal(elastic_run):
    run = elastic_run(*command("hold=2@run-2"))
    assert len(run.report.faults) == 2
    assert not run.reference.faults

@pytest.mark.faults(kill=[(1, 5)], launcher=None)
def test_unequal(elastic_run):
    elastic_run(*command("wrong"))

@pytest.mark.faults(kill=[(1, 500)], launcher=None)
def test_untested(elastic_run):
    elastic_run(*command())

@pytest.mark.faults(kill=[(7, 5)], launcher=None)
def test_mine_to_judge(elastic_run):
    assert elastic_run(*command(), check=False).report.missed

@pytest.mark.faults(launcher=None)
def test_silent(elastic_run):
    elastic_run(sys.executable, "-c", "print('nothing is recorded')")

@pytest.mark.faults(launcher=None)
def test_broken(elastic_run):
    elastic_run(sys.executable, "-c", "import sys; print('I fail'); sys.exit(3)")

@pytest.mark.faults(melt=[(1, 5)])
def test_unknown(elastic_run):
    pass

def test_no_torch():
    assert "torch" not in sys.modules
"""


def test_equality_is_asserted_and_what_is_wrong_is_told(pytester: pytest.Pytester) -> None:
    job = ROOT / "tests" / "support" / "drill_job.py"
    pytester.makepyfile(TESTS.format(job=str(job)))
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", "-rf")
    done.assert_outcomes(passed=3, failed=4, errors=1)
    text = done.stdout.str()
    for says in (
        "AssertionError: the trajectories differ",
        "the run disagrees with itself, step 6",
        "AssertionError: faults that did not happen",
        "AssertionError: no step was recorded",
        "AssertionError: the undisturbed run did not come to its end",
        "I fail",
        "melt",
    ):
        assert says in text, text
    # The timeline is there where a test failed.
    assert "run with faults" in text
    assert "kill@elastic.faults.recorded:rank=1,step=5 in rank 1" in text


TRAINER = """
import os, pathlib
from planaria.elastic.faults import record

rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2"
state = pathlib.Path(f"state-{rank}")
for step in range(int(state.read_text()) + 1 if state.exists() else 1, 9):
    state.write_text(str(step))
    record(step, 1 / step)
"""


@pytest.mark.soak
def test_a_script_is_started_by_torchrun(pytester: pytest.Pytester) -> None:
    (pytester.path / "trainer.py").write_text(TRAINER)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.faults(kill=[(1, 5)], world=2)
        def test_it(elastic_run):
            run = elastic_run("trainer.py")
            assert len(run.report.faults) == 1
        """
    )
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert done.parseoutcomes() == {"passed": 1}, done.stdout.str()


def test_the_marker_is_described(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_subprocess("--markers")
    assert "@pytest.mark.faults(kill=[(rank, step)]" in done.stdout.str()


def test_a_reference_is_made_again_where_it_failed_or_the_script_changed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Any] = ["deadline", "done", "done", "done"]
    made: list[str] = []

    def run(self: Any, name: str, *rest: Any) -> Report:
        made.append(name)
        return Report([], 0.0, outcome=outcomes.pop(0) if name == "undisturbed" else "done")

    monkeypatch.setattr(ElasticRunner, "_run", run)
    script = tmp_path / "train.py"
    script.write_text("one")
    runner = ElasticRunner(_Plan(launcher=None), tmp_path, request.node)

    def references() -> int:
        before = made.count("undisturbed")
        runner(script, check=False)
        return made.count("undisturbed") - before

    assert [references() for _ in range(3)] == [1, 1, 0]
    script.write_text("another")
    assert references() == 1
    monkeypatch.setenv("RATE", "0.1")
    assert references() == 1
