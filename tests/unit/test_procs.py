import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from planaria.core import procs
from planaria.core.deadline import Deadline
from planaria.core.procs import Identity, identity, is_alive, start
from planaria.errors import ConfigError, DeadlineError

LONG = 60.0


def line(proc: procs.Proc) -> str:
    assert proc.stdout is not None
    return proc.stdout.readline().decode().strip()


def gone(who: Identity, seconds: float = LONG) -> bool:
    """Whether a process that is not ours to reap ends in time."""
    deadline = Deadline(seconds)
    while is_alive(who) and not deadline.expired:
        time.sleep(0.01)
    return not is_alive(who)


def test_runs_and_reports_how_it_ended(tmp_path: Path):
    env = {"PATH": os.environ["PATH"], "GREETING": "hi"}
    with start(
        ["sh", "-c", "echo $GREETING $(pwd); exit 3"], env=env, cwd=tmp_path, stdout=subprocess.PIPE
    ) as proc:
        assert line(proc) == f"hi {tmp_path}"
        assert proc.wait(Deadline(LONG)) == 3
        assert proc.poll() == 3
    with start(["sh", "-c", "kill -USR1 $$"]) as proc:
        assert proc.wait(Deadline(LONG)) == -signal.SIGUSR1


def test_the_child_gets_the_environment_and_nothing_else():
    env = {"PATH": os.environ["PATH"], "A": "1"}
    with start(["env"], env=env, stdout=subprocess.PIPE) as proc:
        assert proc.stdout is not None
        assert sorted(proc.stdout.read().decode().split()) == sorted(
            f"{key}={value}" for key, value in env.items()
        )


def test_the_child_leads_a_session_and_keeps_default_signals():
    code = (
        "import os, signal; print(os.getpid() == os.getsid(0) == os.getpgid(0));"
        "print(open('/proc/self/status').read().split('SigIgn:')[1].split()[0])"
    )
    with start([sys.executable, "-c", code], stdout=subprocess.PIPE) as proc:
        assert line(proc) == "True"
    script = "grep SigIgn /proc/self/status"
    with start(["sh", "-c", script], stdout=subprocess.PIPE) as proc:
        assert int(line(proc).split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_passes_file_descriptors():
    read, write = os.pipe()
    try:
        code = f"import os; os.write({write}, b'through')"
        with start([sys.executable, "-c", code], pass_fds=[write]) as proc:
            assert proc.wait(Deadline(LONG)) == 0
        assert os.read(read, 100) == b"through"
    finally:
        os.close(read)
        os.close(write)


def test_bad_commands_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="'no-such-program-here': there is no such program"):
        start(["no-such-program-here"])
    with pytest.raises(ConfigError, match="there is no such program"):
        start(["sh"], env={"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="there is no folder"):
        start(["sh"], cwd=tmp_path / "missing")
    with pytest.raises(ConfigError, match="the command is empty"):
        start([])
    with pytest.raises(ConfigError, match="cannot start 'sh'"):
        start(["sh", "-c", "x" * 10_000_000])


def fence_ends_the_group(killpg: Callable[[int, int], None] = os.killpg) -> None:
    script = "sleep 1000 & echo $!; trap '' TERM; while :; do sleep 1000; done"
    seconds = LONG if killpg is os.killpg else 0.5
    with start(["sh", "-c", script], stdout=subprocess.PIPE) as proc:
        grandchild = identity(int(line(proc)))
        with mock.patch.object(os, "killpg", killpg):
            assert proc.fence(Deadline(seconds)) == -signal.SIGKILL
        assert not is_alive(proc.identity)
        assert not is_alive(grandchild)


def test_fence_ends_the_whole_group():
    fence_ends_the_group()


def test_a_fence_that_kills_nothing_is_noticed():
    with pytest.raises(DeadlineError, match=r"waiting for the end of process \d+ \(sh -c"):
        fence_ends_the_group(lambda group, number: None)


def test_a_fence_that_kills_only_the_leader_is_noticed():
    with pytest.raises(DeadlineError):
        fence_ends_the_group(os.kill)


def test_the_group_ends_with_its_leader():
    with start(["sh", "-c", "sleep 1000 & echo $!; exit 5"], stdout=subprocess.PIPE) as proc:
        grandchild = int(line(proc))
        assert proc.wait(Deadline(LONG)) == 5
        stat = procs._stat(grandchild)
        assert stat is None or stat.state in "ZX"


def test_terminate_lets_it_end_by_itself_also_when_stopped():
    script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done"
    with start(["sh", "-c", script], stdout=subprocess.PIPE) as proc:
        assert line(proc) == "ready"
        proc.signal(signal.SIGSTOP)
        assert proc.terminate(LONG) == 4
        assert line(proc) == "bye"


def test_terminate_fences_what_does_not_listen():
    script = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    with start(["sh", "-c", script], stdout=subprocess.PIPE) as proc:
        assert line(proc) == "ready"
        assert proc.terminate(0.1) == -signal.SIGKILL
        assert proc.terminate(0.1) == -signal.SIGKILL  # once more does no harm


def test_wait_has_a_deadline():
    with (
        start(["sleep", "1000"]) as proc,
        pytest.raises(DeadlineError, match=r"the end of process .*sleep 1000"),
    ):
        proc.wait(Deadline(0.05))


def test_a_child_reaped_by_other_code_is_not_signalled():
    with start(["true"]) as proc:
        os.waitpid(proc.pid, 0)
        with mock.patch.object(os, "killpg") as killpg:
            assert proc.fence(Deadline(LONG)) == procs.UNKNOWN_STATUS
        killpg.assert_not_called()


def test_all_are_ended_when_the_block_ends_in_an_error():
    group = procs.Procs()
    children = [group.start(["sleep", "1000"]) for _ in range(3)]
    assert [proc.pid for proc in group] == [child.pid for child in children]
    with pytest.raises(RuntimeError, match="boom"), group:
        raise RuntimeError("boom")
    assert [child.poll() for child in children] == [-signal.SIGKILL] * 3


def test_a_child_dies_with_its_parent():
    code = (
        "import time; from planaria.core import procs\n"
        "print(procs.start(['sleep', '1000']).pid, flush=True)\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = identity(int(parent.stdout.readline()))
        try:
            # The shim may not have asked for the signal yet; then it finds its parent gone itself.
            parent.kill()
            assert gone(child)
        finally:
            if is_alive(child):
                os.kill(child.pid, signal.SIGKILL)


def start_in_a_thread_that_ends() -> procs.Proc:
    started: list[procs.Proc] = []

    def work() -> None:
        script = "echo ready; sleep 1000"
        started.append(start(["sh", "-c", script], stdout=subprocess.PIPE))
        assert line(started[0]) == "ready"

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return started[0]


def test_a_child_survives_the_thread_that_started_it(monkeypatch: pytest.MonkeyPatch):
    with start_in_a_thread_that_ends() as proc:
        assert not gone(proc.identity, seconds=0.5)
    # Without the thread that lives on, the same check notices.
    monkeypatch.setattr(procs._Spawner, "run", lambda self, job: job())
    with start_in_a_thread_that_ends() as proc:
        assert gone(proc.identity)


def test_a_forked_process_starts_its_own_children():
    with start(["true"]):  # the spawner of this process exists
        pass
    code = (
        "import os; from planaria.core import procs; from planaria.core.deadline import Deadline\n"
        "with procs.start(['true']) as p: p.wait(Deadline(60))\n"
        "if os.fork() == 0:\n"
        "    with procs.start(['sh', '-c', 'exit 6']) as p: os._exit(p.wait(Deadline(60)))\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "6\n"


def test_identity_of_this_process():
    me = identity()
    assert me.pid == os.getpid()
    assert is_alive(me)
    assert Identity(*json.loads(json.dumps(me))) == identity(os.getpid())


def test_a_recycled_process_id_is_not_the_process():
    me = identity()
    assert not is_alive(me._replace(start=me.start - 1))


def test_dead_and_zombie_processes_are_not_alive():
    with start(["true"]) as proc:
        os.waitid(os.P_PID, proc.pid, os.WEXITED | os.WNOWAIT)
        assert procs._stat(proc.pid) is not None  # a zombie until it is reaped
        assert not is_alive(proc.identity)
        proc.wait(Deadline(LONG))
        assert not is_alive(proc.identity)
    with pytest.raises(ConfigError, match="no process"):
        identity(2**22 + 1)  # beyond the largest id that Linux gives


def test_only_the_machine_itself_can_tell():
    me = identity()
    rebooted = me._replace(boot="0" + me.boot[1:] if me.boot[0] != "0" else "1" + me.boot[1:])
    assert not is_alive(rebooted)
    with pytest.raises(ConfigError, match="host elsewhere"):
        is_alive(rebooted._replace(host="elsewhere"))
    with pytest.raises(ConfigError, match="in the same container"):
        is_alive(me._replace(boot=me.boot.partition("/")[0] + "/1"))


def test_program_names_may_hold_anything(tmp_path: Path):
    program = tmp_path / "a) R 1 (b c"
    program.write_text("#!/bin/sh\nsleep 1000\n")
    program.chmod(0o755)
    with start([program]) as proc:
        deadline = Deadline(LONG)
        while "a) R" not in Path(f"/proc/{proc.pid}/comm").read_text():
            deadline.check("the program to be executed")
            time.sleep(0.01)
        assert identity(proc.pid) == proc.identity
        assert is_alive(proc.identity)
