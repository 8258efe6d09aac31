"""The suite's own promise: a test module that leaves something running fails, and it is ended."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from source_tree import ROOT

DEADLINE_S = 240


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this suite's conftest, impatient, and nothing else."""
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    assert "GRACE_S = 30.0" in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace("GRACE_S = 30.0", "GRACE_S = 0.3"))
    support = ROOT / "tests" / "support"
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\npythonpath = {support}\n"
    )
    return tmp_path


def run_pytest(project: Path, source: str) -> str:
    (project / "test_it.py").write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    return done.stdout + done.stderr


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + DEADLINE_S
    while lives(pid):
        assert time.monotonic() < until, f"process {pid} is still there"
        time.sleep(0.02)


def test_clean_module_passes(project: Path) -> None:
    assert "1 passed" in run_pytest(project, "def test_it(free_port): assert free_port > 0")


@pytest.mark.parametrize("orphan", [False, True], ids=["child", "orphan"])
def test_process_left_behind(project: Path, orphan: bool) -> None:
    sleep = "['sleep', '600']"
    if orphan:
        sleep = "['sh', '-c', 'setsid sleep 600 & echo $! > child']"
    output = run_pytest(
        project,
        f"""
        import subprocess, pathlib
        def test_it():
            child = subprocess.Popen({sleep})
            pathlib.Path("child").write_text(str(child.pid))
            if {orphan}:
                child.wait()
        """,
    )
    assert "left behind by this module" in output
    assert "sleep 600" in output
    wait_until_gone(int((project / "child").read_text()))


def test_thread_left_behind(project: Path) -> None:
    # It ends with the interpreter's main thread, so that the inner pytest can end.
    output = run_pytest(
        project,
        """
        import threading
        def test_it():
            threading.Thread(target=threading.main_thread().join, name="stray").start()
        """,
    )
    assert "thread stray" in output


def test_folder_imported_by_itself(project: Path) -> None:
    output = run_pytest(
        project,
        """
        import sys, types
        def test_it():
            sys.modules["checkpoint"] = types.ModuleType("checkpoint")
        """,
    )
    assert "not as part of planaria: ['checkpoint']" in output


def test_ranks_and_their_server_end_when_the_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time

            def hang(rank, folder):
                pids = f"{os.getpid()} {os.getppid()}"
                partial = pathlib.Path(folder) / "partial"
                partial.write_text(pids)
                partial.rename(pathlib.Path(folder) / "pids")
                time.sleep(600)

            if __name__ == "__main__":
                import ranks
                ranks.run_ranks(1, hang, sys.argv[1], timeout=600, init_group=False)
            """
        )
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    caller = subprocess.Popen([sys.executable, script, tmp_path], env=environ)
    try:
        until = time.monotonic() + DEADLINE_S
        while not (tmp_path / "pids").exists():
            assert caller.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until_gone(pid)
