"""`planaria goodput` and `planaria trace`: every moment counts once, the trace is well formed."""

import io
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.launch import goodput
from planaria.launch.cli import main
from planaria.launch.config import RunConf
from planaria.launch.goodput import NAMES, Taken, account
from planaria.launch.intervals import common, length, union, without
from planaria.launch.metrics import MetricsWriter, StepRecord
from planaria.launch.perfetto import chrome_trace
from planaria.launch.run_folder import DONE, FAILED, PREEMPTED, RUNNING, Attempt, RunFolder, Status
from planaria.launch.saves import saves_of

PARTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8).map(
    lambda pairs: union((a, a + n) for a, n in pairs)
)


@given(PARTS, PARTS)
def test_intervals_are_sets(one, other) -> None:
    def points(parts: Any) -> set[float]:
        return {p + 0.5 for a, b in parts for p in range(int(a), int(b))}

    assert points(union([*one, *other])) == points(one) | points(other)
    assert points(common(one, other)) == points(one) & points(other)
    assert points(without(one, other)) == points(one) - points(other)
    assert length(one) == len(points(one))


def span(name: str, t: float, dur: float, rank: int = 0, **attrs: Any) -> dict[str, Any]:
    return {"t": t, "kind": "span", "name": name, "dur": dur, "rank": rank, "pid": 10 + rank,
            "thread": "MainThread", **attrs}  # fmt: skip


TIMES = st.floats(0, 100)
SPANS = st.builds(
    span, st.sampled_from([*goodput._SPANS, "train.update"]), TIMES, st.floats(0, 30),
    st.integers(0, 1),
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 30), st.sampled_from([DONE, FAILED, PREEMPTED])),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(st.integers(1, 6), TIMES, st.floats(0, 10)), max_size=12),
    st.lists(SPANS, max_size=12),
)
def test_every_moment_counts_once(gaps, steps, records) -> None:
    attempts, now = [], 5.0
    for i, (idle, lasted, outcome) in enumerate(gaps):
        started = now + idle
        now = started + lasted
        attempts.append(Attempt(i, 2, started, now, outcome))
    taken = sorted((Taken(n, t, t + d) for n, t, d in steps), key=lambda t: t.end)
    found = account(attempts, taken, records)
    wanted = now - attempts[0].started
    wanted -= sum(
        b.started - a.ended
        for a, b in itertools.pairwise(attempts)
        if a.outcome == DONE and a.ended is not None
    )
    assert found.total_s == pytest.approx(wanted, abs=1e-6)
    assert all(s >= -1e-9 for s in found.seconds.values())
    assert set(found.seconds) == set(NAMES)


def test_each_cause_has_its_name() -> None:
    attempts = [Attempt(0, 1, 0.0, 20.0, FAILED), Attempt(1, 1, 25.0, 50.0, DONE),
                Attempt(2, 1, 90.0, 95.0, DONE)]  # fmt: skip
    taken = [Taken(1, 4, 8), Taken(2, 8, 12), Taken(3, 12, 16), Taken(3, 30, 34), Taken(4, 35, 40)]
    records = [
        span("checkpoint.call", 8, 0.5, step=1),
        span("checkpoint.call", 8.25, 0.5, rank=1, step=1),  # together, 0.75 s
        span("data.wait", 9, 1),
        span("checkpoint.restore", 27, 2),
        span("checkpoint.close", 40, 3),
        span("train.update", 4, 1),
    ]
    found = account(attempts, taken, records)
    assert found.seconds == pytest.approx(
        {
            "GOODPUT": 4 + (4 - 0.75 - 1) + 4 + 5,
            "PROGRAM_STARTUP": 4 + (5 - 2) + 5,
            "DATA_LOADING_SYNC": 1,
            "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME": 0.75 + 3,
            "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME": 2,
            "WASTED_PROGRESS_FROM_DISRUPTION": 4 + 4,  # step 3, and what was begun after it
            "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION": 5,
            "OTHER": 1 + 7,
        }
    )
    assert (found.attempts, found.steps, found.repeated) == (3, 4, 1)


# A run's folder, as a killed and resumed run leaves it


def write_telemetry(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    for rank in {r["rank"] for r in records}:
        lines = [json.dumps(r) for r in records if r["rank"] == rank]
        (folder / f"rank-{rank:05d}.1.jsonl").write_text("\n".join(lines) + "\n")


def records_of_a_run() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in (2, 4):
        t = 100.0 + step
        for rank in (0, 1):
            pid = 20 + rank
            made += [
                span("train.forward_backward", t - 1, 0.8, rank, step=step - 1) | {"pid": pid},
                span("train.update", t - 0.2, 0.2, rank, step=step - 1) | {"pid": pid},
                span("checkpoint.call", t, 0.01 * (rank + 1), rank, step=step) | {"pid": pid},
                span("checkpoint.gate", t + 0.5, 0.02, rank, step=step) | {"pid": pid},
                span("checkpoint.capture", t + 0.1, 0.2, rank, step=step)
                | {"pid": pid, "thread": "planaria-capture"},
                span("checkpoint.persist", t + 0.2, 0.6, rank, step=step, ok=True)
                | {"pid": pid, "thread": "planaria-write"},
                span("checkpoint.fsync", t + 0.5, 0.1, rank, step=step)
                | {"pid": pid, "thread": "planaria-write"},
            ]
    made.append({"t": 104.9, "kind": "count", "name": "checkpoint.bytes", "value": 7, "rank": 0,
                 "pid": 20, "thread": "planaria-write", "step": 4})  # fmt: skip
    made.append({"t": 104.95, "kind": "event", "name": "checkpoint.retry", "rank": 1, "pid": 21,
                 "thread": "planaria-write", "error": "disk"})  # fmt: skip
    return sorted(made, key=lambda r: r["t"])


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "demo")
    folder.lock()
    folder.freeze(RunConf(steps=4), {"python": "3"})
    attempts = [Attempt(0, 2, 100.0, 104.5, FAILED), Attempt(1, 2, 104.6, 106.0, DONE)]
    folder.write_status(Status(DONE, 4, 4, attempts))
    folder.unlock()
    with MetricsWriter(folder.metrics) as log:
        for step, attempt in ((1, 0), (2, 0), (3, 0), (3, 1), (4, 1)):
            t = 100.9 + step + attempt
            log.write(StepRecord(step, 1.0, (1.0).hex(), 8, 0.5, 0.1, attempt, t))
    write_telemetry(folder.telemetry, records_of_a_run())
    return folder


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_goodput_of_a_folder(run_folder, capsys) -> None:
    code, out, _ = run(capsys, "goodput", run_folder.path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["total_s"] == pytest.approx(6.0)
    assert sum(facts["seconds"].values()) == pytest.approx(6.0)
    assert (facts["attempts"], facts["steps"], facts["repeated"]) == (2, 4, 1)
    _, out, _ = run(capsys, "goodput", run_folder.path)
    for name in NAMES:
        assert name in out
    assert "1 taken again" in out


def test_what_is_told_of_a_mirror(run_folder, capsys) -> None:
    """A copy that is under way, one that failed, one that is there; a newer step overtakes."""
    assert json.loads(run(capsys, "goodput", run_folder.path, "--json")[1])["mirror"] is None
    records = records_of_a_run()

    def told(name: str, t: float, **more: Any) -> dict[str, Any]:
        return {"t": t, "kind": "event", "name": f"checkpoint.mirror_{name}", "rank": 0, "pid": 20,
                "thread": "planaria-mirror", **more}  # fmt: skip

    slow = [
        told("begun", 103.0, step=2),
        span("checkpoint.mirror", 103.0, 0.5, step=2) | {"pid": 20, "error": "OSError"},
        told("retry", 103.5),
        told("begun", 104.0, step=2),
        span("checkpoint.mirror", 104.0, 1.5, step=2) | {"pid": 20, "bytes": 3_000_000},
        told("begun", 105.5, step=4),
    ]
    write_telemetry(run_folder.telemetry, sorted([*records, *slow], key=lambda r: r["t"]))
    found = json.loads(run(capsys, "trace", run_folder.path, "--json")[1])["mirror"]
    assert found == {
        "committed": 2,
        "copied": 1,
        "nbytes": 3_000_000,
        "failed": 1,
        "behind": 4,
        "seconds": pytest.approx(2.0),
        "behind_s": pytest.approx(105.5 - 102.8),
    }
    for verb in ("goodput", "trace"):
        line = run(capsys, verb, run_folder.path)[1].splitlines()[-1]
        assert line == (
            "mirror: 1 of 2 checkpoints copied, 3.0 MB at 1.5 MB/s, each within 2.7 s of its "
            "commit; 1 try failed; step 4, the newest, is not copied yet"
        )


def test_goodput_where_there_is_only_ascii(run_folder, monkeypatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["goodput", str(run_folder.path)]) == 0
    sys.stdout.flush()
    assert b"GOODPUT" in out.getvalue()


def test_goodput_of_a_run_that_lost_its_launcher(run_folder) -> None:
    status = run_folder.read_status()
    status.state, status.attempts[1].ended, status.attempts[1].outcome = RUNNING, None, RUNNING
    run_folder.write_status(status)
    found = goodput.measure(run_folder)
    assert found.total_s == pytest.approx(5.9), "until the last step that it told of"


def test_goodput_of_a_users_script(run_folder) -> None:
    """Nobody writes down its steps: the checkpointer's own calls tell."""
    run_folder.metrics.unlink()
    steps = [
        {"t": 101.0 + s, "kind": "event", "name": "checkpoint.step", "step": s, "rank": rank,
         "pid": 20 + rank, "thread": "MainThread"}
        for s in (0, 1, 2) for rank in (0, 1)
    ]  # fmt: skip
    taken = goodput.steps_taken(run_folder, steps)
    assert [(t.step, t.start, t.end) for t in taken] == [
        (0, 101.0, 101.0),
        (1, 101.0, 102.0),
        (2, 102.0, 103.0),
    ]


def check_trace(trace: Mapping[str, Any]) -> None:
    """What Chrome's format asks for: known phases, named tracks, spans that nest on each."""
    events = trace["traceEvents"]
    named = {(e["pid"], e.get("tid")) for e in events if e["ph"] == "M"}
    spans: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for e in events:
        assert e["ph"] in "XCiM"
        if e["ph"] == "M":
            continue
        assert e["ts"] >= 0
        assert (e["pid"], None) in named
        if e["ph"] == "X":
            assert e["dur"] >= 0
            spans[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for found in spans.values():
        open_ends: list[float] = []
        for start, end in sorted(found, key=lambda s: (s[0], -s[1])):
            while open_ends and open_ends[-1] <= start + 1e-3:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-3
            open_ends.append(end)


@given(st.lists(SPANS, max_size=12))
def test_any_spans_make_a_trace(records) -> None:
    records.sort(key=lambda r: r["t"])
    trace = chrome_trace(records, [Attempt(0, 2, 0.0, 100.0, DONE)])
    check_trace(trace)
    assert sum(e["ph"] == "X" for e in trace["traceEvents"]) == len(records) + 1


def test_trace_and_picture(run_folder, tmp_path, capsys) -> None:
    png = tmp_path / "pictures" / "t.png"
    code, out, _ = run(capsys, "trace", run_folder.path, "--png", png, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["ranks"], facts["events"], facts["step_s"]) == (2, 32, pytest.approx(0.5))
    assert [(s["step"], s["ok"]) for s in facts["saves"]] == [(2, True), (4, True)]
    assert facts["saves"][0]["stall_s"] == pytest.approx(0.04), "of the rank that waited longest"
    trace = json.loads(Path(facts["trace"]).read_text())
    check_trace(trace)
    labels = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert sorted(labels) == [
        "launcher",
        *(f"rank {r}, attempt {a} (pid {20 + r})" for r in (0, 1) for a in (0, 1)),
    ]
    (retry,) = [e for e in trace["traceEvents"] if e["name"] == "checkpoint.retry"]
    assert (retry["ph"], retry["args"]) == ("i", {"error": "disk"})
    (counter,) = [e for e in trace["traceEvents"] if e["ph"] == "C"]
    assert counter["args"] == {"value": 7}
    assert png.read_bytes().startswith(b"\x89PNG")
    _, out, _ = run(capsys, "trace", run_folder.path, "--out", tmp_path / "other.json")
    assert "8.0% of a step" in out
    assert (tmp_path / "other.json").exists()


def test_a_step_that_was_saved_twice_is_two_saves() -> None:
    records = records_of_a_run()
    later = [{**r, "t": r["t"] + 50.0} for r in records]
    assert [s.step for s in saves_of([*records, *later])] == [2, 4, 2, 4]


@pytest.mark.parametrize("verb", ["trace", "goodput"])
def test_what_is_no_run_is_refused(verb, tmp_path, capsys) -> None:
    for path in ("/nowhere", tmp_path):
        code, out, err = run(capsys, verb, path)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_what_cannot_be_drawn_is_told(run_folder, tmp_path, capsys, monkeypatch) -> None:
    code, _, err = run(capsys, "trace", run_folder.path, "--png", tmp_path / "x.png", "--step", 3)
    assert (code, "no save of step 3" in err) == (2, True)
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "trace", run_folder.path, "--out", tmp_path / "file" / "x.json")
    assert (code, "cannot be written" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "trace", run_folder.path, "--png", tmp_path / "x.png")
    assert (code, "planaria[bench]" in err) == (2, True)
    assert run(capsys, "trace", run_folder.path)[0] == 0, "the trace alone needs nothing"


def test_a_run_without_telemetry_or_attempts(tmp_path, capsys) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.lock()
    folder.freeze(RunConf(steps=4), {"python": "3"})
    folder.unlock()
    code, _, err = run(capsys, "trace", folder.path)
    assert (code, "no telemetry" in err) == (2, True)
    code, _, err = run(capsys, "goodput", folder.path)
    assert (code, "never started" in err) == (2, True)
