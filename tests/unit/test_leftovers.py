"""The suite's own promise: a test module that leaves something running fails, and it is ended."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from source_tree import ROOT

DEADLINE_S = 240


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with this suite's conftest, impatient, and nothing else."""
    folder = tmp_path_factory.mktemp("project")
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    assert "GRACE_S = 30.0" in conftest
    (folder / "conftest.py").write_text(conftest.replace("GRACE_S = 30.0", "GRACE_S = 0.3"))
    support = ROOT / "tests" / "support"
    (folder / "pytest.ini").write_text(
        f"[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\npythonpath = {support}\n"
    )
    return folder


MODULES = {
    "clean": "def test_it(free_port): assert free_port > 0",
    "child": """
        import subprocess, pathlib
        def test_it():
            child = subprocess.Popen(['sleep', '600'])
            pathlib.Path("child").write_text(str(child.pid))
        """,
    "orphan": """
        import subprocess
        def test_it():
            subprocess.run(['sh', '-c', 'setsid sleep 601 & echo $! > orphan'])
        """,
    # It ends with the interpreter's main thread, so that the inner pytest can end.
    "thread": """
        import threading
        def test_it():
            threading.Thread(target=threading.main_thread().join, name="stray").start()
        """,
    # What it leaves is there for good, so it comes last.
    "zimport": """
        import sys, types
        def test_it():
            sys.modules["checkpoint"] = types.ModuleType("checkpoint")
        """,
}


@pytest.fixture(scope="module")
def told(project: Path) -> dict[str, str]:
    """What a run of the modules says of each."""
    for name, source in MODULES.items():
        (project / f"test_{name}.py").write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    output = done.stdout + done.stderr
    assert f"{len(MODULES)} passed, {len(MODULES) - 1} errors" in output, output
    _, *sections = re.split(r"_ ERROR at teardown of test_it _+\n", output)
    assert len(sections) == len(MODULES) - 1, output
    return dict(zip([name for name in MODULES if name != "clean"], sections, strict=True))


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


def test_a_clean_module_passes(told: dict[str, str]) -> None:
    assert "clean" not in told


@pytest.mark.parametrize(("name", "command"), [("child", "sleep 600"), ("orphan", "sleep 601")])
def test_process_left_behind(project: Path, told: dict[str, str], name: str, command: str) -> None:
    assert "left behind by this module" in told[name]
    assert command in told[name]
    wait_until_gone(int((project / name).read_text()))


def test_thread_left_behind(told: dict[str, str]) -> None:
    assert "thread stray" in told["thread"]


def test_folder_imported_by_itself(told: dict[str, str]) -> None:
    assert "not as part of planaria: ['checkpoint']" in told["zimport"]


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
                ranks.PRELOAD = ()
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
