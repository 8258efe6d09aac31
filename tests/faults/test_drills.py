"""Schedules are carried out on real processes, and leave none of them behind."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import ROOT

from planaria.core.deadline import Deadline
from planaria.elastic.faults import Fault, Report, carry_out, differences, sockets
from planaria.elastic.faults.actions import Target, corrupt_file, corrupt_memory, sides, small_disk
from planaria.elastic.faults.picture import draw
from planaria.elastic.faults.processes import MARK, RankProcess, end_all, marked, ranks_of
from planaria.elastic.faults.schedule import RECORDED
from planaria.errors import ConfigError, NotSupportedError

JOB = ROOT / "tests" / "support" / "drill_job.py"
DEADLINE_S = 120.0


def drill(tmp_path: Path, *faults: Fault, args: tuple[str, ...] = ("40", "2"), **options) -> Report:
    work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
    work.mkdir()
    steps, world, *rest = args
    options = {"deadline_s": DEADLINE_S, "folder": work / "drill", **options}
    return carry_out([sys.executable, str(JOB), steps, world, str(work), *rest], faults, **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Report:
    made = drill(tmp_path_factory.mktemp("reference"))
    assert (made.outcome, made.codes, made.missed) == ("done", [0], [])
    assert sorted(made.step_times()) == list(range(1, 41))
    return made


def test_kills_inside_and_outside_happen_once_and_nothing_is_lost(
    tmp_path: Path, reference: Report
) -> None:
    made = drill(
        tmp_path,
        Fault("kill", (1,), step=4, point=RECORDED),
        Fault("kill", (0,), step=7),
        args=("40", "2", "hold=2"),
    )
    assert made.outcome == "done", made.lines()
    assert len(made.faults) == 2, made.lines()
    assert len(made.of("died")) >= 2
    assert not made.missed
    assert not made.of("left behind")
    assert not differences(made.trajectory, reference.trajectory)
    (inside,) = [e for e in made.faults if "kill@" in e.text]
    killed = [s for s in made.trajectory.records if s.rank == 1 and s.step == 4]
    assert len(killed) == 1  # its successor was not killed there again, and went on
    assert inside.rank == 1
    draw(made, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(made.to_json())


def test_a_trainer_that_forgets_something_is_noticed(tmp_path: Path, reference: Report) -> None:
    made = drill(tmp_path, Fault("kill", (1,), step=4), args=("40", "2", "wrong", "hold=1"))
    found = differences(made.trajectory, reference.trajectory)
    assert found
    assert "disagrees with itself" in found[0]


def test_what_is_stopped_goes_on_and_what_is_slowed_is_let_go(
    tmp_path: Path, reference: Report
) -> None:
    made = drill(
        tmp_path,
        Fault("stop", (0,), step=3, for_s=0.5),
        Fault("slow", (1,), step=2, for_s=0.3, share=0.3),
        args=("40", "2", "hold=2"),
    )
    assert made.outcome == "done"
    assert len(made.of("heal")) == 2
    assert not differences(made.trajectory, reference.trajectory)


def test_a_hung_job_is_ended_at_the_deadline(tmp_path: Path) -> None:
    endless = Fault("stop", (0,), step=2, for_s=float("inf"))
    made = drill(tmp_path, endless, deadline_s=6.0, args=("40", "2", "hold=1"))
    assert (made.outcome, made.codes) == ("deadline", [])


def test_what_a_command_leaves_is_ended_and_told(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(600)'], start_new_session=True)"
    )
    made = carry_out([sys.executable, "-c", code], folder=tmp_path / "drill", deadline_s=DEADLINE_S)
    assert made.outcome == "done"
    assert [True for e in made.of("left behind") if "sleep(600)" in e.text]


def test_a_command_that_fails_is_started_again(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; p = pathlib.Path('again'); n = len(p.read_text()) if p.exists() "
        "else 0; p.write_text('x' * (n + 1)); print('life', n); sys.exit(0 if n == 2 else 1)"
    )
    command = [sys.executable, "-c", code]
    made = carry_out(command, folder=tmp_path / "d", deadline_s=DEADLINE_S, cwd=tmp_path, again=5)
    assert (made.outcome, made.codes, made.output) == ("done", [1, 1, 0], "life 2\n")
    bad = [sys.executable, "-c", "import sys; sys.exit(2)"]
    made = carry_out(bad, folder=tmp_path / "e", deadline_s=DEADLINE_S, again=5)
    assert (made.outcome, made.codes) == ("failed", [2])  # it would be as wrong the next time


def test_a_fault_that_did_not_happen_is_told(tmp_path: Path) -> None:
    made = drill(
        tmp_path,
        Fault("kill", (0,), step=99),
        Fault("kill", (0,), step=99, point=RECORDED),
        Fault("corrupt_file", step=1, target="none-*"),
        Fault("corrupt_memory", (0,), step=1, target="/no such mapping"),
    )
    assert made.outcome == "done"
    assert len(made.missed) == 4, made.lines()


def test_a_random_fault_hits_who_is_there(tmp_path: Path) -> None:
    made = drill(
        tmp_path, Fault("kill", (7,), at_s=0.05), open_ended=True, spare=(0,),
        args=("40", "2", "hold=1"),
    )  # fmt: skip
    assert [e.rank for e in made.faults] == [1], made.lines()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        carry_out(["true"], folder=tmp_path, deadline_s=1)
    with pytest.raises(ConfigError, match="no such program"):
        carry_out(["no-such-program"], folder=tmp_path / "x", deadline_s=1)


def test_one_bit_of_a_file_and_of_memory_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(1000))
    before = file.stat().st_mtime_ns
    assert "data" in corrupt_file(file, random.Random(1))
    assert sum(bin(b).count("1") for b in file.read_bytes()) == 1
    assert file.stat().st_mtime_ns == before
    fd = os.memfd_create("planaria-drill-test")
    os.ftruncate(fd, 1 << 20)
    code = (
        "import mmap, sys; m = mmap.mmap(int(sys.argv[1]), 0); print('x', flush=True);"
        "sys.stdin.read(); print(sum(bin(b).count('1') for b in m[:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(fd)], pass_fds=(fd,), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.close(fd)
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        try:
            corrupt_memory(process.pid, "/memfd:planaria-drill-test*", random.Random(2))
        except ConfigError as error:
            process.kill()
            pytest.skip(str(error))
        process.stdin.close()
        assert process.stdout.read() == "1\n"


@contextlib.contextmanager
def talkers(count: int, mark: str) -> Iterator[list[tuple[socket.socket, subprocess.Popen[bytes]]]]:
    """Processes with RANKs that each send a byte every few milliseconds over a connection to us."""
    code = (
        "import socket, sys, time\ns = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "while True: s.sendall(b'x'); time.sleep(0.01)"
    )
    made: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            for rank in range(count):
                env = {**os.environ, MARK: mark, "RANK": str(rank)}
                command = [sys.executable, "-c", code, str(server.getsockname()[1])]
                process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
                server.settimeout(60)
                made.append((server.accept()[0], process))
        yield made
    finally:
        for link, process in made:
            link.close()
            process.kill()
            process.wait(60)


def arrives(link: socket.socket, seconds: float) -> bool:
    """Whether anything comes within some seconds, but for what was there already."""
    link.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while link.recv(1 << 16):
            pass
    link.settimeout(seconds)
    try:
        return bool(link.recv(1))
    except TimeoutError:
        return False


def need_sockets() -> None:
    if not sockets.may_cut():
        pytest.skip("this process may not duplicate sockets of others")


def test_a_partition_is_silent_and_heals() -> None:
    need_sockets()
    with talkers(2, "partition-test") as [(one, first), (other, _)]:
        assert arrives(one, 60)
        cut = sockets.Cut(lambda: sockets.between([first.pid], [os.getpid()]))
        try:
            assert not arrives(one, 0.3)
            assert arrives(other, 60)
        finally:
            assert cut.end() == 2
        assert arrives(one, 60)  # what was sent meanwhile is sent again: nothing is lost


def test_connections_that_are_reset_are_gone() -> None:
    need_sockets()
    with talkers(1, "reset-test") as [(link, process)]:
        port = link.getsockname()[1]
        cut = sockets.Cut(lambda: sockets.to_port([process.pid], port), reset=True)
        assert process.wait(60) != 0
        assert cut.end() == 1


def test_sides_go_with_their_ranks() -> None:
    with talkers(3, "sides-test"):
        ranks = ranks_of("sides-test")
        assert sorted(ranks) == [0, 1, 2]
        one, other = sides(Target("sides-test", ranks, Path(), 0), {0, 2})
        assert one == {ranks[0].pid, ranks[2].pid}
        assert other == {ranks[1].pid}
        assert set(marked("sides-test")) == one | other
        assert len(end_all("sides-test", Deadline(60))) == 3
        assert not ranks[0].signal(signal.SIGCONT)
        assert not ranks_of("sides-test")


def test_a_child_of_a_rank_is_no_rank() -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(600)']); print(p.pid, flush=True); p.wait()"
    )
    env = {**os.environ, MARK: "child-test", "RANK": "5"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        until = time.monotonic() + 60
        while child not in marked("child-test"):
            assert time.monotonic() < until
        found = ranks_of("child-test")
        assert {r: p.pid for r, p in found.items()} == {5: process.pid}
        assert isinstance(found[5], RankProcess)
        assert found[5].alive
    finally:
        end_all("child-test", Deadline(60))
        process.communicate(timeout=60)


def test_a_small_disk_is_small(tmp_path: Path) -> None:
    try:
        with (
            small_disk(tmp_path / "disk", 1 << 20) as folder,
            pytest.raises(OSError, match="No space"),
        ):
            (folder / "big").write_bytes(bytes(2 << 20))
    except NotSupportedError as error:
        pytest.skip(str(error))
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["partition", "store_loss"])
def test_a_job_over_gloo_outlives_what_passes(tmp_path: Path, kind: str) -> None:
    need_sockets()
    job = str(ROOT / "tests" / "support" / "gloo_job.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    made = carry_out(
        [*torchrun, "3", job], [Fault(kind, (1,), step=5, for_s=1.5)],
        folder=tmp_path / "drill", deadline_s=280.0,
    )  # fmt: skip
    assert made.outcome == "done", [*made.lines(), made.output]
    assert len(made.step_times()) == 60
    assert not made.trajectory.conflicts()
    assert not made.missed
    if kind == "partition":
        (gap,) = made.gaps()
        assert (gap.seconds or 0) > 1.0  # nothing came through meanwhile


def test_a_fault_is_not_taken_for_another_of_a_longer_number(tmp_path: Path) -> None:
    code = "from planaria.elastic.faults import record; record(15, 1.0)"
    faults = [Fault("kill", (0,), step=s, point="elastic.faults.recorded") for s in (15, 1)]
    made = carry_out([sys.executable, "-c", code], faults, folder=tmp_path / "drill",
                     deadline_s=DEADLINE_S, env={"RANK": "0"})  # fmt: skip
    assert len(made.faults) == 1
    assert "kill rank 0 at step 1 " in made.missed[0].text
