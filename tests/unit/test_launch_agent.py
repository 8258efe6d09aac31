"""The agent: how ranks are started, asked to stop, fenced and told of."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from planaria.core.deadline import Deadline
from planaria.core.procs import end_sessions
from planaria.elastic.agent.ranks import RankFailure, RankLogs, StopRequest
from planaria.launch import exit_codes, run_folder
from planaria.launch.agent import Agent, StoppedError
from planaria.launch.exit_codes import PREEMPTED
from planaria.launch.launchers import common
from planaria.launch.progress import Progress
from planaria.launch.rendezvous import FixedRendezvous


class Rig:
    """An agent whose ranks run a few lines of Python without torch."""

    def __init__(self, folder: Path, code: str, **options):
        self.folder = folder
        self.attempts = 0
        self.failures: list[RankFailure] = []
        self.restarted: list[bool] = []
        self.stop = StopRequest()
        self._ended = threading.Event()
        script = folder / "rank.py"
        script.write_text(
            "import json, os, signal, sys, time\nfrom pathlib import Path\n"
            "rank, attempt = int(os.environ['RANK']), int(os.environ['PLANARIA_ATTEMPT'])\n"
            f"folder = Path({str(folder)!r})\n"
            "def wait_for(name):\n"
            "    while not (folder / name).exists(): time.sleep(0.01)\n" + textwrap.dedent(code)
        )
        self.rendezvous = FixedRendezvous(
            nproc=2, load_token=lambda: b"", begin=self._begin, check=lambda: None
        )
        logs = RankLogs(
            lambda attempt: folder / f"attempt-{attempt}",
            {"EXTRA": "yes"},
            lambda: self.attempts - 1,
        )
        settings = {"max_restarts": 0, "grace_s": 60.0, "fence_s": 1.0, **options}
        self.agent = Agent(
            rendezvous=self.rendezvous,
            command=[str(script)],
            logs=logs,
            stop=self.stop,
            on_failure=self._note,
            **settings,
        )

    def _begin(self):
        self.attempts += 1
        return self.attempts - 1, ""

    def _note(self, failures, will_restart):
        self.failures = failures
        self.restarted.append(will_restart)

    def run(self):
        try:
            return self.agent.run_job()
        finally:
            self._ended.set()
            self.rendezvous.shutdown()

    def when(self, name: str, act) -> None:
        """Acts once every rank has made a file of its own with this name."""

        def watch():
            while not self._ended.wait(0.01):
                if all((self.folder / f"{name}-{rank}").exists() for rank in range(2)):
                    act()
                    return

        threading.Thread(target=watch, daemon=True).start()

    def log(self, rank: int, attempt: int = 0) -> str:
        return (self.folder / f"attempt-{attempt}" / f"rank-{rank}.log").read_text()


@pytest.fixture
def rig(tmp_path):
    before = signal.getsignal(signal.SIGQUIT)
    yield lambda code, **options: Rig(tmp_path, code, **options)
    signal.signal(signal.SIGQUIT, before)


def test_ranks_get_torchruns_environment_and_a_log_each(rig):
    it = rig("print(json.dumps(dict(os.environ)))")
    result = it.run()
    assert not result.is_failed()
    assert not it.agent.preempted
    for rank in range(2):
        env = json.loads(it.log(rank))
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert env["LOCAL_WORLD_SIZE"] == "2"
        assert env["TORCHELASTIC_RESTART_COUNT"] == "0"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["PLANARIA_LAUNCHER_PID"] == str(os.getpid())
        assert env["EXTRA"] == "yes"


def test_the_ranks_store_listens_on_loopback_alone(rig):
    it = rig(
        """
        port = int(os.environ["MASTER_PORT"])
        rows = [r.split() for f in ("tcp", "tcp6")
                for r in Path(f"/proc/net/{f}").read_text().splitlines()[1:]]
        print(*[r[1] for r in rows if r[3] == "0A" and r[1].endswith(f":{port:04X}")])
        """
    )
    it.run()
    address, _, _ = it.log(0).strip().partition(":")
    assert address in ("0100007F", "0000000000000000FFFF00000100007F")


def test_a_dead_rank_is_named_and_the_others_are_fenced(rig):
    it = rig(
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / "deaf").touch()
            time.sleep(600)
        wait_for("deaf")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = it.run()
    assert result.is_failed()
    (failure,) = it.failures
    assert (failure.rank, failure.how) == (1, "was killed by SIGKILL")
    assert it.restarted == [False]


@pytest.mark.parametrize("late", [False, True])
def test_the_cause_comes_before_its_consequences(rig, late):
    """Also where the rank that failed first is so slow to end that it is ended."""
    it = rig(
        """
        text = "RuntimeError: Connection closed by peer" if rank == 0 else "ValueError: boom"
        extra = {"py_callstack": "Traceback ...\\n" + text}
        error = {"message": {"message": text, "extraInfo": extra}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error))
        if rank == 0:
            wait_for("second-is-ready")
            (folder / "first").touch()
        else:
            (folder / "second-is-ready").touch()
            wait_for("first")
            time.sleep(600 * (folder / "late").exists())
        sys.exit(1)
        """
    )
    if late:
        (it.folder / "late").touch()
    it.run()
    assert it.failures[0].how == "failed with ValueError: boom"
    assert it.failures[0].traceback is not None
    assert it.failures[0].traceback.endswith("ValueError: boom")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"message": 3}'])
def test_a_damaged_error_file_still_gives_the_exit_code(rig, content):
    it = rig(
        f"""
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text({content!r})
        sys.exit(7)
        """
    )
    it.run()
    assert it.failures[0].how == "exited with code 7"


@pytest.mark.parametrize("way", ["ends well", "fails", "is asked to stop", "is started again"])
def test_what_a_rank_has_started_ends_with_it(rig, way):
    it = rig(
        f"""
        import subprocess
        child = [sys.executable, "-c", "import time; time.sleep(600)"]
        for group in (None, 0):  # one in the rank's own process group, one not
            pid = subprocess.Popen(child, process_group=group).pid
            with open(folder / f"children-{{rank}}", "a") as file: print(pid, file=file)
        (folder / f"ready-{{rank}}").touch()
        wait_for("ready-0"), wait_for("ready-1")
        if {way!r} == "is asked to stop":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            (folder / f"listens-{{rank}}").touch()
            time.sleep(600)
        sys.exit({way!r} == "fails" or {way!r} == "is started again" and attempt == 0)
        """,
        max_restarts=int(way == "is started again"),
    )
    it.when("listens", it.stop.request)
    it.run()
    pids = [int(p) for r in range(2) for p in (it.folder / f"children-{r}").read_text().split()]
    assert len(pids) == 4 * it.attempts
    assert not any(_lives(pid) for pid in pids)


def test_a_stranger_with_the_id_of_a_rank_is_left_alone():
    """It leads a session of its own, as a rank does, but no launcher of ours has started it."""
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        end_sessions([stranger.pid], f"PLANARIA_LAUNCHER_PID={os.getpid()}", Deadline(60))
        assert _lives(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait(timeout=60)


def outcome(exit_code: int, error: str | None) -> common.Outcome:
    return common.Outcome(run_folder.FAILED, [RankFailure(0, 1, exit_code, Path("log"), error)])


@pytest.mark.parametrize("code", [exit_codes.CONFIG, exit_codes.CORRUPT])
def test_only_errors_of_planaria_become_its_exit_codes(code):
    assert outcome(code, "CorruptError: step 3").exit_code == code
    assert outcome(code, None).exit_code == exit_codes.FAILED, "a script's own sys.exit"


STOPPABLE = """
    def stop(*_):
        print("saved", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / f"ready-{rank}").touch()
    time.sleep(600)
"""


def test_a_request_to_stop_lets_the_ranks_save(rig):
    it = rig(STOPPABLE, max_restarts=3)
    it.when("ready", it.stop.request)
    result = it.run()
    assert not result.is_failed()
    assert it.agent.preempted
    assert it.attempts == 1
    assert [it.log(rank) for rank in range(2)] == ["saved\n", "saved\n"]


def test_ranks_that_stop_by_themselves_are_preempted_too(rig):
    it = rig(f"sys.exit({PREEMPTED})")
    assert not it.run().is_failed()
    assert it.agent.preempted


DEAF = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"ready-{rank}").touch()
    time.sleep(600)
"""


def test_a_second_request_ends_deaf_ranks_at_once(rig):
    it = rig(DEAF)

    def twice():
        it.stop.request()
        it.stop.request(at_once=True)

    it.when("ready", twice)
    with pytest.raises(StoppedError):
        it.run()


def test_only_a_second_ctrl_c_ends_at_once():
    class Notes:
        def __init__(self):
            self.told = []

        def note(self, text):
            self.told.append(text)

    stop, notes = StopRequest(), Notes()
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with common.signals(stop, cast(Progress, notes)):
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert not stop.at_once
        signal.raise_signal(signal.SIGINT)
        assert stop.at_once
    assert len(notes.told) == 1
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_the_grace_ends(rig):
    it = rig(DEAF, grace_s=0.3)
    it.when("ready", it.stop.request)
    with pytest.raises(StoppedError):
        it.run()


def test_a_request_before_the_ranks_listen_ends_them(rig):
    it = rig(
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"ready-{rank}").touch()
        time.sleep(600)
        """
    )
    it.when("ready", it.stop.request)
    with pytest.raises(StoppedError):
        it.run()


def test_failed_ranks_are_started_again_with_a_store_of_their_own(rig):
    it = rig(
        """
        print(os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["MASTER_PORT"])
        sys.exit(attempt == 0 and rank == 1)
        """,
        max_restarts=1,
    )
    assert not it.run().is_failed()
    assert it.restarted == [True]
    (count_0, port_0), (count_1, port_1) = (it.log(0, attempt).split() for attempt in (0, 1))
    assert (count_0, count_1) == ("0", "1")
    assert port_0 != port_1


def test_restarts_end(rig):
    it = rig("sys.exit(1)", max_restarts=2)
    assert it.run().is_failed()
    assert it.restarted == [True, True, False]
    assert it.attempts == 3


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path):
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import pathlib, sys, time\n"
        "from planaria.launch.worker import die_with_launcher\n"
        "die_with_launcher()\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    launcher = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'PLANARIA_LAUNCHER_PID': str(os.getpid())}\n"
        "ranks = [subprocess.Popen([sys.executable, *sys.argv[1:], f'ready-{i}'], env=env,"
        " start_new_session=True) for i in range(2)]\n"
        "print(*[rank.pid for rank in ranks], flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    until = time.monotonic() + 60
    while not all((tmp_path / f"ready-{i}").exists() for i in range(2)):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    process.stdout.close()
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < until, "a rank outlived its launcher"
        time.sleep(0.01)


def test_a_rank_that_comes_too_late_ends_itself(tmp_path):
    code = "from planaria.launch.worker import die_with_launcher; die_with_launcher(); print('on')"
    env = {**os.environ, "PLANARIA_LAUNCHER_PID": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=240)
    assert ran.returncode == 128 + signal.SIGKILL
    assert ran.stdout == b""


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
