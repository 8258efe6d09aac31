"""The step records, what they add up to, and what is shown of them."""

import io
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planaria import telemetry
from planaria.launch import config, metrics
from planaria.launch.config import RunConf
from planaria.launch.metrics import MetricsFollower, MetricsWriter, StepRecord
from planaria.launch.output import age, size
from planaria.launch.progress import Progress
from planaria.launch.run_folder import DONE, FAILED, Attempt, RunFolder, Status
from planaria.launch.summary import summarise


def record(step: int, loss: float = 1.0, attempt: int = 0, seconds: float = 0.5) -> StepRecord:
    return StepRecord(step, loss, loss.hex(), 100, seconds, 0.1, attempt, 0.0)


def write(path, records) -> None:
    with MetricsWriter(path) as writer:
        for each in records:
            writer.write(each)


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_losses_come_back_bit_by_bit(tmp_path_factory, loss):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    write(path, [record(1, loss)])
    (back,) = metrics.read(path)
    assert back == record(1, loss)
    assert float.fromhex(back.loss_hex).hex() == loss.hex()


def test_half_a_line_of_a_killed_process_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2)])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [r.step for r in metrics.read(path)] == [1, 2]
    write(path, [record(3)])
    assert [r.step for r in metrics.read(path)] == [1, 2, 3]


def test_a_follower_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == []
    write(path, [record(1)])
    assert [r.step for r in follower.poll()] == [1]
    line = json.dumps(record(2).__dict__)
    with path.open("a") as file:
        file.write(line[:10])
    assert follower.poll() == []
    with path.open("a") as file:
        file.write(line[10:] + "\n")
    assert [r.step for r in follower.poll()] == [2]
    late = MetricsFollower(path, from_end=True)
    write(path, [record(3)])
    assert [r.step for r in late.poll()] == [3]


def test_repeated_steps_count_once_and_are_compared():
    records = [record(1, 3.0), record(2, 2.0), record(3, 1.5), record(2, 2.0, 1), record(3, 1.4, 1)]
    assert metrics.repeats(records) == (2, 1)
    kept = metrics.kept(records)
    assert list(kept) == [1, 2, 3]
    assert (kept[2].attempt, kept[3].loss) == (1, 1.4)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.freeze(RunConf(steps=4), {})
    yield folder
    folder.unlock()
    telemetry.close()


def test_the_summary_adds_up(folder, monkeypatch):
    write(folder.metrics, [record(1, 4.0), record(2, 3.0), record(3, 2.0)])
    write(folder.metrics, [record(3, 2.0, 1), record(4, 1.0, 1)])
    attempts = [Attempt(0, 2, 0.0, 3.0, FAILED, "killed"), Attempt(1, 2, 10.0, 11.0, DONE)]
    folder.write_status(Status(DONE, 4, 4, attempts))
    telemetry.configure(folder.telemetry, 0)
    for _ in range(2):
        with telemetry.span("checkpoint.call", step=2):
            pass
        with telemetry.span("checkpoint.persist", step=2) as span:
            span.set(ok=True)
        telemetry.count("checkpoint.bytes", 1000, step=2)
    with telemetry.span("checkpoint.persist", step=3) as span:
        span.set(ok=False)
    telemetry.close()
    telemetry.configure(folder.telemetry, 1)
    with telemetry.span("checkpoint.gate", step=2):
        time.sleep(0.05)
    with telemetry.span("checkpoint.persist", step=2) as span:
        span.set(ok=True)
    telemetry.count("checkpoint.bytes", 500, step=2)
    telemetry.close()

    summary = summarise(folder)
    assert (summary.state, summary.step, summary.steps, summary.attempts) == (DONE, 4, 4, 2)
    assert (summary.first_loss, summary.last_loss) == (4.0, 1.0)
    assert (summary.wall_s, summary.useful_s, summary.goodput) == (4.0, 2.0, 0.5)
    assert (summary.repeated_steps, summary.identical_repeats) == (1, 1)
    assert summary.tokens_per_s == 200
    assert (summary.checkpoints, summary.bytes_written) == (2, 2500)
    assert summary.stall_s is not None
    # The rank that waited longest is rank 1; its wait is spread over both checkpoints.
    assert summary.stall_s > 0.02
    text = dict(summary.lines())
    assert text["state"] == "done at step 4 of 4"
    assert text["loss"] == "4.0000 -> 1.0000"
    assert text["repeated steps"] == "1, of which 1 had bit-identical losses"
    assert text["goodput"].startswith("50.0%")
    assert text["checkpoints"].startswith("2, 2.5 kB in all")
    assert json.loads(json.dumps(summary.to_json()))["goodput"] == 0.5


def test_the_summary_of_a_run_that_did_nothing(folder):
    summary = summarise(folder)
    assert (summary.step, summary.first_loss, summary.stall_s, summary.goodput) == (
        0,
        None,
        None,
        0,
    )
    assert [label for label, _ in summary.lines()] == ["state", "folder"]


def test_the_summary_of_a_script_counts_no_steps(folder):
    conf = config.load(folder.config)
    conf.script = ["train.py"]
    folder.config.write_text(config.dump(conf))
    assert summarise(folder).steps is None
    assert dict(summarise(folder).lines())["state"] == "running"


def test_progress_shows_steps_checkpoints_and_output(folder):
    screen = io.StringIO()
    log = folder.path / "rank-0.log"
    log.write_text("hello from the script\n")
    seen = []
    progress = Progress(
        Console(file=screen, width=200),
        metrics=folder.metrics,
        telemetry_folder=folder.telemetry,
        output=lambda: log,
        steps=40,
        log_every=20,
        on_step=seen.append,
    )
    with progress:
        progress.note("a note")
        telemetry.configure(folder.telemetry, 0)
        with telemetry.span("checkpoint.restore") as span:
            span.set(step=10, bytes=1000, tier="mirror", damaged=[11, 10])
        with telemetry.span("checkpoint.heal", step=10) as span:
            span.set(files=["step-00000010/manifest.json"])
        with telemetry.span("checkpoint.persist", step=20) as span:
            span.set(ok=True)
        telemetry.close()
        write(folder.metrics, [record(step) for step in (19, 20, 21)])
    lines = screen.getvalue().splitlines()
    assert [r.step for r in seen] == [19, 20, 21]
    assert lines[0] == "a note"
    assert "hello from the script" in lines
    restored = next(i for i, line in enumerate(lines) if line.startswith("restored"))
    assert lines[restored].startswith("restored step 10 from the mirror (1.0 kB on rank 0")
    assert lines[restored + 1].startswith("damaged: step 11, 10;")
    assert lines[restored + 2] == "step 10 is whole again, from its mirror"
    steps = [line for line in lines if line.startswith("step") and "loss" in line]
    assert steps == ["step 20/40  loss 1.0000  200 tokens/s  checkpoint 20 committed"]


def test_progress_on_a_terminal_is_one_live_line(folder):
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True)
    with Progress(
        console,
        metrics=folder.metrics,
        telemetry_folder=folder.telemetry,
        steps=40,
        log_every=20,
    ):
        write(folder.metrics, [record(1)])
    assert "loss" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2.5e15, "2500.0 TB")],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (120, "2 min"), (7200, "2 h"), (2e5, "2 d")]
)
def test_ages(seconds, text):
    assert age(seconds) == text
