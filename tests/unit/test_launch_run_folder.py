"""The run folder: freezing, resuming, locking, moving aside."""

import json
import os
import stat
import subprocess
import sys

import pytest

from planaria.errors import ConfigError
from planaria.launch import config, run_folder
from planaria.launch.config import RunConf
from planaria.launch.job import Job, adopt, common_facts
from planaria.launch.metrics import StepRecord
from planaria.launch.run_folder import DONE, FAILED, PREEMPTED, RUNNING, RunFolder

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "data": "abc"}


@pytest.fixture
def conf():
    return RunConf(steps=10)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    yield folder
    folder.unlock()


def test_freezing_writes_what_a_run_needs(folder, conf):
    frozen = folder.freeze(conf, VERSIONS)
    assert config.load(folder.config) == frozen
    assert json.loads(folder.versions.read_text()) == VERSIONS
    assert stat.S_IMODE(folder.token.stat().st_mode) == 0o600
    assert len(folder.token.read_text()) > 32
    # What the configuration leaves open is decided once.
    assert frozen.optim.decay_steps == 10


def test_the_same_configuration_resumes(folder, conf):
    frozen = folder.freeze(conf, VERSIONS)
    before = folder.config.stat().st_mtime_ns
    assert folder.resume(conf, VERSIONS) == (frozen, [])
    assert folder.config.stat().st_mtime_ns == before


def test_another_configuration_is_refused_and_named(folder, conf):
    folder.freeze(conf, VERSIONS)
    text = folder.config.read_text()
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 -> 0\.5[\s\S]*--fresh"):
        folder.resume(config.compose(["steps=10", "optim.lr=0.5"]), VERSIONS)
    assert folder.config.read_text() == text


def test_extending_keeps_the_curve_of_the_learning_rate(folder, conf):
    folder.freeze(conf, VERSIONS)
    longer, remarks = folder.resume(RunConf(steps=50), VERSIONS)
    assert (longer.steps, longer.optim.decay_steps) == (50, 10)
    assert remarks == ["extended from 10 to 50 steps"]
    with pytest.raises(ConfigError, match="not shortened"):
        folder.resume(conf, VERSIONS)


def test_other_ranks_are_allowed_and_told(folder, conf):
    folder.freeze(conf, VERSIONS)
    fewer = RunConf(steps=10)
    fewer.launcher.nproc = 1
    _, remarks = folder.resume(fewer, VERSIONS)
    assert "1 ranks instead of 2" in remarks[0]


def test_other_versions_are_told_and_other_data_is_refused(folder, conf):
    folder.freeze(conf, VERSIONS)
    _, remarks = folder.resume(conf, {**VERSIONS, "torch": "2.14.0"})
    assert len(remarks) == 1
    assert "torch is now '2.14.0', was '2.13.0'" in remarks[0]
    assert json.loads(folder.versions.read_text())["earlier"] == [VERSIONS]
    with pytest.raises(ConfigError, match="other data"):
        folder.resume(conf, {**VERSIONS, "data": "xyz"})


def test_a_folder_of_others_is_left_alone(tmp_path, conf):
    folder = RunFolder(tmp_path)
    folder.lock()
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        folder.freeze(conf, VERSIONS)
    folder.unlock()
    assert not folder.config.exists()
    (tmp_path / ".lock").unlink()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        folder.lock()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_freeze_that_was_cut_short_is_done_again(folder, conf):
    folder.freeze(conf, VERSIONS)
    folder.config.rename(folder.path / ".config.yaml.123")
    assert not folder.exists()
    folder.freeze(conf, VERSIONS)
    assert folder.exists()


def test_moving_aside_deletes_nothing(folder, conf):
    folder.freeze(conf, VERSIONS)
    old = folder.move_aside()
    assert old is not None
    assert config.load(old / "config.yaml").steps == 10
    assert not folder.exists()
    folder.freeze(conf, VERSIONS)
    again = folder.move_aside()
    assert again is not None
    assert again != old


def test_one_launcher_at_a_time_even_in_another_process(folder):
    assert folder.is_active()
    other = RunFolder(folder.path)
    assert other.is_active()
    with pytest.raises(ConfigError, match="in use by process"):
        other.lock()
    module = "planaria.launch.run_folder"
    code = f"import sys; from {module} import RunFolder; RunFolder(sys.argv[1]).lock()"
    ran = subprocess.run(
        [sys.executable, "-c", code, folder.path], capture_output=True, timeout=240
    )
    assert ran.returncode != 0
    assert b"in use" in ran.stderr
    folder.unlock()
    assert not other.is_active()
    other.lock()
    other.unlock()


def test_an_unusable_folder_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--run"):
        RunFolder(tmp_path / "file" / "run").lock()


DAMAGED = ("", "{", "[]", '{"state": "done", "colour": 1}', '{"attempts": [{}]}', '{"step": "1"}')


def test_a_damaged_status_is_one_error(folder, conf):
    folder.freeze(conf, VERSIONS)
    for text in DAMAGED:
        folder.status.write_text(text)
        with pytest.raises(ConfigError, match=r"status\.json"):
            folder.read_status()


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_status_does_not_hold_a_run_up(open_job, conf, text):
    job = open_job(conf)
    job.begin_attempt()
    job.folder.attempt_logs(3).mkdir(parents=True)
    job.folder.status.write_text(text)
    job.folder.unlock()
    again = open_job(conf)
    assert not again.begun
    assert len(again.remarks) == 1
    assert "status.json" in again.remarks[0]
    assert again.begin_attempt()[0] == 4, "logs of earlier attempts stay"
    assert again.folder.read_status().state == RUNNING


@pytest.mark.parametrize("text", ["", "{", "[]", None])
def test_damaged_versions_do_not_hold_a_run_up(folder, conf, text):
    folder.freeze(conf, VERSIONS)
    if text is None:
        folder.versions.unlink()
    else:
        folder.versions.write_text(text)
    _, remarks = folder.resume(conf, VERSIONS)
    assert len(remarks) == 1
    assert "versions.json could not be read" in remarks[0]
    assert folder.resume(conf, VERSIONS)[1] == []


def test_small_files_are_synced_before_they_take_their_place(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def name(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(name(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    run_folder.write_atomic(tmp_path / "x", "text")
    assert calls == [f".x.{os.getpid()}", "replace", tmp_path.name]


@pytest.fixture
def open_job(tmp_path, monkeypatch):
    monkeypatch.setattr("planaria.launch.versions.gather", lambda conf: dict(VERSIONS))
    jobs = []

    def open_(conf, *, fresh=False):
        job = Job.open(RunFolder(tmp_path / "run"), conf, fresh=fresh)
        jobs.append(job)
        return job

    yield open_
    for job in jobs:
        job.folder.unlock()


def record(step):
    return StepRecord(step, 1.0, (1.0).hex(), 8, 0.1, 0.1, 0, 0.0)


def test_a_job_from_start_to_end(open_job, conf):
    job = open_job(conf)
    assert not job.begun
    number, frozen = job.begin_attempt()
    assert (number, frozen) == (0, config.dump(job.conf))
    assert job.folder.read_status().state == RUNNING
    job.take_step(record(3))
    job.end_attempt(FAILED, "rank 1 was killed")
    assert job.folder.read_status().step == 3
    assert job.folder.read_status().attempts[0].reason == "rank 1 was killed"
    assert job.begin_attempt()[0] == 1
    job.end_attempt(PREEMPTED)
    assert not job.finished
    job.begin_attempt()
    job.end_attempt(DONE)
    job.folder.unlock()

    assert open_job(conf).finished


def test_a_finished_job_can_be_extended_or_begun_anew(open_job, conf):
    job = open_job(conf)
    job.begin_attempt()
    job.end_attempt(DONE)
    job.folder.unlock()
    with pytest.raises(ConfigError, match=r"done up to step 10, but its checkpoints are gone"):
        Job.open(job.folder, RunConf(steps=20), fresh=False)
    job.folder.unlock()
    assert config.load(job.folder.config).steps == 10
    again = open_job(conf)
    assert again.finished, "to sum it up takes no checkpoint"
    again.folder.unlock()
    commit = job.folder.ckpt / "step-00000010" / "manifest.json"
    commit.parent.mkdir(parents=True)
    commit.touch()
    longer = open_job(RunConf(steps=20))
    assert longer.begun
    assert not longer.finished
    longer.folder.unlock()
    fresh = open_job(RunConf(steps=5), fresh=True)
    assert not fresh.begun
    assert "is now in" in fresh.remarks[0]


def test_what_a_dead_launcher_left_open_is_closed(open_job, conf):
    job = open_job(conf)
    job.begin_attempt()
    job.folder.unlock()
    attempt = open_job(conf).status.attempts[0]
    assert attempt.outcome == FAILED
    assert attempt.ended is not None
    assert attempt.ended >= attempt.started


def test_nodes_compare_what_is_computed_and_nothing_else(monkeypatch):
    monkeypatch.setattr("planaria.launch.versions.gather", lambda conf: dict(VERSIONS))
    conf, same, other = RunConf(), RunConf(log_every=3), RunConf(seed=3)
    same.launcher.nproc = 7
    assert common_facts(conf) == common_facts(same)
    assert common_facts(conf) != common_facts(other)


def test_a_further_node_takes_the_first_ones_configuration(tmp_path, conf):
    folder = RunFolder(tmp_path / "node")

    def offer(conf):
        adopt(folder, config.dump(conf))

    offer(conf)
    assert config.load(folder.config) == conf
    offer(RunConf(steps=50))
    assert config.load(folder.config).steps == 50
    with pytest.raises(ConfigError, match=r"first node's \(seed\)"):
        offer(RunConf(steps=50, seed=3))
    assert config.load(folder.config).seed == 0


def test_atomic_writing_leaves_nothing_behind_on_failure(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        run_folder.write_atomic(tmp_path / "missing" / "x", "text")
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        run_folder.write_atomic(tmp_path / "target", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
