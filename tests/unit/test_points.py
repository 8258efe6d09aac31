import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core import points
from planaria.errors import ConfigError, FaultError

A = points.declare("test.points.a", "first point of these tests")
B = points.declare("test.points.b", "second point of these tests")


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    points.disarm()


def run(spec: str, body: str, **env: str) -> subprocess.Popen[str]:
    """Runs a body in a process whose faults come from the environment."""
    code = "from planaria.core import points; A = points.declare('test.points.a', 'here')\n" + body
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, points.ENV: spec, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def firings(spec: str, visits: int, name: str = A) -> list[int]:
    """Which visits of a point, from 1, raised a fault."""
    found = []
    with points.armed(spec):
        for visit in range(1, visits + 1):
            try:
                points.point(name, step=visit)
            except FaultError:
                found.append(visit)
    return found


def test_nothing_armed_does_nothing():
    points.point(A)
    points.point("not.declared")
    assert points.fired() == {}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("raise=x@test.points.a", [1]),
        ("raise=x@test.points.a:hit=3", [3]),
        ("raise=x@test.points.a:hit=2,times=2", [2, 3]),
        ("raise=x@test.points.a:times=inf", [1, 2, 3, 4, 5]),
        ("raise=x@test.points.a:step=4", [4]),
        ("raise=x@test.points.a:step=4,hit=2", []),
        ("raise=x@test.*:hit=5", [5]),
        ("raise=x@test.points.b", []),
        ("raise=x@test.points.[ac]:hit=1; raise=y@test.points.?:hit=4", [1, 4]),
        (" ; raise=x@test.points.a : hit = 2 , times = 1 ; ", [2]),
    ],
)
def test_when_a_clause_fires(spec: str, expected: list[int]):
    assert firings(spec, 5) == expected


def test_rank_and_attempt_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert firings("raise=x@test.points.a:rank=0,attempt=0", 1) == [1]
    assert firings("raise=x@test.points.a:rank=1", 1) == []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert firings("raise=x@test.points.a:rank=1,attempt=2", 1) == [1]
    assert firings("raise=x@test.points.a:rank=1,attempt=0", 1) == []


def test_errors_name_the_point():
    with points.armed("enospc@test.points.a; eio@test.points.b; raise=Disk: gone, you see@*:hit=3"):
        with pytest.raises(OSError, match=r"No space left.*test\.points\.a") as full:
            points.point(A)
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as bad:
            points.point(B)
        assert bad.value.errno == errno.EIO
        with pytest.raises(
            FaultError, match=r"Disk: gone, you see \(injected at test\.points\.b\)"
        ):
            points.point(B)


def test_sleep(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    # The module's alone: other threads of this process may be waiting for something.
    monkeypatch.setattr(points, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    with points.armed("sleep=0.25@test.points.a"):
        points.point(A)
        points.point(A)
    assert slept == [0.25]


def test_kill_and_exit_in_the_process_that_reaches_the_point():
    body = "print('before', flush=True); points.point(A); print('after', flush=True)"
    killed = run("kill@test.points.a:rank=3", body, RANK="3")
    assert killed.communicate() == ("before\n", "")
    assert killed.returncode == -signal.SIGKILL
    left = run("exit=7@test.points.a", body)
    assert left.communicate()[0] == "before\n"
    assert left.returncode == 7
    spared = run("kill@test.points.a:rank=3", body, RANK="2")
    assert spared.communicate()[0] == "before\nafter\n"
    assert spared.returncode == 0


def test_stop_holds_the_thread_that_reached_the_point():
    body = (
        "import threading\n"
        "def work():\n    points.point(A); print('after', flush=True)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()"
    )
    stopped = run("stop@test.points.a", body)
    _, status = os.waitpid(stopped.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.communicate()[0] == "after\n"
    assert stopped.returncode == 0


def test_bad_environment_is_named():
    process = run("explode@here", "")
    assert "environment variable PLANARIA_FAULTS: bad fault clause" in process.communicate()[1]
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("clause", "why"),
    [
        ("kill", "it has no '@'"),
        ("explode@a", "there is no action 'explode'"),
        ("kill=9@a", "action 'kill' takes no"),
        ("exit@a", "action 'exit' needs"),
        ("exit=256@a", "exit code '256'"),
        ("exit=-1@a", "exit code '-1'"),
        ("sleep=long@a", "'long' is not a number of seconds"),
        ("sleep=nan@a", "'nan' is not a number of seconds"),
        ("raise=@a", "the message is empty"),
        ("kill@", "'' is not a pattern"),
        ("kill@A B", "'A B' is not a pattern"),
        ("kill@a:when=3", "there is no condition 'when'"),
        ("kill@a:hit=0", "hit='0' is not a whole number >= 1"),
        ("kill@a:hit=inf", "hit='inf' is not a whole number"),
        ("kill@a:times=0", "times='0'"),
        ("kill@a:rank=-1", "rank='-1'"),
        ("kill@a:rank", "rank=''"),
        ("kill@a:rank=1,rank=2", "condition 'rank' is given twice"),
    ],
)
def test_a_bad_clause_is_named_with_the_grammar(clause: str, why: str):
    with pytest.raises(ConfigError) as caught:
        points.arm(f"kill@fine:hit=99;{clause}")
    assert f"bad fault clause {clause!r}: {why}" in str(caught.value)
    assert points.GRAMMAR in str(caught.value)
    assert points.fired() == {}  # nothing was armed, the good clause neither


@given(
    verb=st.sampled_from(["kill", "stop", "enospc", "eio", "exit=3", "raise=m", "sleep=0.1"]),
    glob=st.from_regex(r"[a-z*?]{1,5}(\.[a-z_]{1,5}){0,2}", fullmatch=True),
    conditions=st.dictionaries(
        st.sampled_from(["rank", "hit", "times", "attempt", "step"]), st.integers(1, 10**9)
    ),
)
def test_every_clause_of_the_grammar_parses_to_what_it_says(verb, glob, conditions):
    text = f"{verb}@{glob}" + ":" * bool(conditions)
    text += ",".join(f"{key}={value}" for key, value in conditions.items())
    (fault,) = points.parse(text)
    assert (fault.text, fault.glob) == (text, glob)
    assert {key: getattr(fault, key) for key in conditions} == conditions


@given(st.text(alphabet="kilseptoraxhn=@:;,.*[]? 019-", max_size=40))
def test_any_text_parses_or_is_refused_as_configuration(text: str):
    try:
        faults = points.parse(text)
    except ConfigError:
        return
    assert len(faults) <= text.count("@")


def test_armed_restores_what_was_armed_before():
    points.arm("raise=outer@test.points.a:times=inf")
    with points.armed("raise=inner@test.points.b:times=inf"):
        points.arm("sleep=0@test.points.a")
        assert set(points.fired()) == {
            "raise=outer@test.points.a:times=inf",
            "raise=inner@test.points.b:times=inf",
            "sleep=0@test.points.a",
        }
    points.point(B)
    with pytest.raises(FaultError, match="outer"):
        points.point(A)
    points.disarm()
    points.point(A)


def test_callbacks_see_name_and_step_and_may_raise():
    seen: list[tuple[str, int | None]] = []
    with points.armed(callbacks={"test.points.*": lambda name, step: seen.append((name, step))}):
        points.point(A, step=3)
        points.point(B)

        def fail(name: str, step: int | None) -> None:
            raise KeyError(name)

        points.arm_callback(B, fail)
        with pytest.raises(KeyError, match=B):
            points.point(B)
    points.point(B)
    assert seen == [(A, 3), (B, None), (B, None)]
    with pytest.raises(ConfigError, match="not a pattern"):
        points.arm_callback("", print)


def test_fired_shows_clauses_that_tested_nothing():
    with points.armed("sleep=0@test.points.a:times=inf; kill@misspelt.point"):
        points.point(A)
        points.point(A)
        assert points.fired() == {"sleep=0@test.points.a:times=inf": 2, "kill@misspelt.point": 0}


def test_hits_are_counted_once_over_threads():
    hits: list[str] = []
    with points.armed("raise=x@test.points.a:hit=500,times=3"):

        def work() -> None:
            for _ in range(250):
                try:
                    points.point(A)
                except FaultError:
                    hits.append("x")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(hits) == 3


def test_declare():
    assert points.declare(A, "first point of these tests") == A  # a module loaded again
    assert points.declared()[A] == "first point of these tests"
    with pytest.raises(ConfigError, match="declared twice"):
        points.declare(A, "something else")
    with pytest.raises(ConfigError, match="lower-case words"):
        points.declare("Not A Name", "x")


def test_an_undeclared_point_is_an_error_once_a_test_arms_faults():
    with (
        points.armed("sleep=0@other"),
        pytest.raises(ConfigError, match=r"'test\.points\.typo' is not"),
    ):
        points.point("test.points.typo")


def test_firings_are_logged_and_a_successor_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PLANARIA_FAULTS_LOG", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    spec = "raise=No@test.points.a:times=2;sleep=0@test.points.b:times=inf"

    def life() -> int:
        raised = 0
        with points.armed(spec):
            for step in range(4):
                points.point(B, step=step)
                try:
                    points.point(A, step=step)
                except FaultError:
                    raised += 1
        return raised

    assert life() == 2
    assert life() == 0  # the same rank, started again
    monkeypatch.setenv("RANK", "2")
    assert life() == 2
    notes = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    ours = sorted((n["rank"], n["step"]) for n in notes if n["point"] == A)
    assert ours == [("2", 0), ("2", 1), ("3", 0), ("3", 1)]
    assert {n["pid"] for n in notes} == {os.getpid()}
    assert any(n["point"] == B and n["clause"].startswith("sleep") for n in notes)
    monkeypatch.setenv("PLANARIA_FAULTS_LOG", str(tmp_path / "none"))
    with points.armed(spec), pytest.raises(ConfigError, match="PLANARIA_FAULTS_LOG"):
        points.point(A)
