import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from planaria import telemetry
from planaria.errors import ConfigError


@pytest.fixture(autouse=True)
def _off():
    telemetry.close()
    yield
    telemetry.close()


def python(body: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from planaria import telemetry\n" + body],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_records_come_back(tmp_path: Path):
    folder = tmp_path / "new" / "telemetry"
    telemetry.configure(folder, rank=3)
    assert telemetry.enabled()
    with telemetry.span("save", step=7) as span:
        telemetry.event("gate", open=True)
        span.set(bytes=12)
    telemetry.count("loss", 0.5, step=7)
    with pytest.raises(KeyError), telemetry.span("load"):
        raise KeyError("x")
    telemetry.flush()

    (file,) = folder.iterdir()
    assert file.name == f"rank-00003.{os.getpid()}.jsonl"
    records = list(telemetry.read(folder))
    common = {"rank": 3, "pid": os.getpid(), "thread": "MainThread"}
    times = [record.pop("t") for record in records]
    durations = [record.pop("dur") for record in records if record["kind"] == "span"]
    assert times == sorted(times)
    assert all(duration >= 0 for duration in durations)
    assert records == [
        {"kind": "span", "name": "save", **common, "step": 7, "bytes": 12},
        {"kind": "event", "name": "gate", **common, "open": True},
        {"kind": "count", "name": "loss", "value": 0.5, **common, "step": 7},
        {"kind": "span", "name": "load", "error": "KeyError", **common},
    ]


def test_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert not telemetry.enabled()
    with telemetry.span("a", step=1) as span:
        span.set(bytes=1)
    telemetry.event("b")
    telemetry.count("c", 1)
    telemetry.flush()
    assert telemetry.span("a") is telemetry.span("b")  # nothing is made when off
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_picked_up_at_the_first_use(tmp_path: Path):
    body = "telemetry.event('hello')"
    assert python(body, PLANARIA_TELEMETRY=str(tmp_path / "t"), RANK="2").returncode == 0
    (record,) = telemetry.read(tmp_path / "t")
    assert (record["name"], record["rank"]) == ("hello", 2)
    assert (tmp_path / "t" / f"rank-00002.{record['pid']}.jsonl").exists()


def test_an_unusable_folder_in_the_environment_does_not_stop_training(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = python(
        "telemetry.event('a'); telemetry.event('b'); print(telemetry.enabled())",
        PLANARIA_TELEMETRY=str(tmp_path / "file" / "t"),
    )
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert done.stderr.count("telemetry is off") == 1


def test_configure_refuses_what_cannot_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use .*file/t"):
        telemetry.configure(tmp_path / "file" / "t")
    with pytest.raises(ConfigError, match="rank '-1'"):
        telemetry.configure(tmp_path, rank=-1)
    with pytest.raises(ConfigError, match="no telemetry folder"):
        list(telemetry.read(tmp_path / "missing"))


def test_values_beyond_json_are_recorded_as_text(tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    telemetry.configure(tmp_path)
    loop: list[object] = []
    loop.append(loop)

    class Rude:
        def __str__(self) -> str:
            raise RuntimeError

    telemetry.event("odd", a=math.nan, b={"c": math.inf}, path=Path("x"), loop=loop, d={(1,): 2})
    telemetry.event("numbers", i=numpy.int64(2**60 + 1), f=numpy.float32(0.5), rude=Rude())
    telemetry.event("names", name="mine", t=5, rank=-1, error="no class")
    lines = [json.loads(line) for line in next(tmp_path.iterdir()).read_text().splitlines()]
    assert (lines[0]["a"], lines[0]["b"]) == ("nan", "{'c': inf}")
    assert (lines[0]["path"], lines[0]["d"]) == ("x", "{(1,): 2}")
    assert (lines[1]["i"], lines[1]["f"]) == (2**60 + 1, 0.5)
    assert lines[1]["rude"] == "<Rude: RuntimeError>"
    assert (lines[2]["name"], lines[2]["name_"], lines[2]["t_"]) == ("names", "mine", 5)
    assert (lines[2]["rank"], lines[2]["rank_"], lines[2]["error"]) == (0, -1, "no class")


def test_ranks_and_attempts_are_merged_in_order_of_time(tmp_path: Path):
    for rank, pid, times in [(0, 11, [3, 1, 5]), (1, 12, [2, 6]), (1, 13, [4])]:
        lines = [json.dumps({"t": t, "kind": "event", "name": "x", "rank": rank}) for t in times]
        (tmp_path / f"rank-0000{rank}.{pid}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "other.jsonl").write_text("not telemetry\n")
    assert [record["t"] for record in telemetry.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_killed_process_loses_nothing_and_harms_nobody(tmp_path: Path):
    body = (
        f"telemetry.configure({str(tmp_path)!r})\n"
        "for i in range(10): telemetry.event('e', i=i)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    assert python(body).returncode == -signal.SIGKILL
    (file,) = tmp_path.iterdir()
    with file.open("a") as torn:
        torn.write('{"t": 1.0, "kind": "ev')
    assert [record["i"] for record in telemetry.read(tmp_path)] == list(range(10))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What telemetry has logged; what other threads have is another matter."""
    return [r.getMessage() for r in caplog.records if r.name == telemetry.__name__]


def test_damage_in_the_middle_is_skipped_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good = '{"t": 1, "name": "a"}\n'
    (tmp_path / "rank-00000.1.jsonl").write_text(
        good + "\0\0\n" + good + "{}\n" + '"x"\n' + "[" * 10**5 + "\n" + '{"t": null}\n' + good
    )
    with caplog.at_level(logging.WARNING):
        assert len(list(telemetry.read(tmp_path))) == 3
    (said,) = told(caplog)
    assert "rank-00000.1.jsonl" in said


def test_a_process_id_that_comes_round_gets_a_file_of_its_own(tmp_path: Path):
    earlier = tmp_path / f"rank-00000.{os.getpid()}.jsonl"
    earlier.write_text('{"t": 1, "torn')
    telemetry.configure(tmp_path)
    telemetry.event("mine")
    assert earlier.read_text() == '{"t": 1, "torn'
    assert [record["name"] for record in telemetry.read(tmp_path)] == ["mine"]


def test_follow_returns_each_whole_line_once(tmp_path: Path):
    follower = telemetry.follow(tmp_path / "later")
    assert follower.poll() == []
    (tmp_path / "later").mkdir()
    first = tmp_path / "later" / "rank-00000.1.jsonl"
    first.write_text('{"t": 1, "name": "n"}\n{"name": "n", "t": 2')
    assert [record["t"] for record in follower.poll()] == [1]
    assert follower.poll() == []
    with first.open("a") as file:
        file.write('}\n{"t": 4, "name": "n"}\n')
    (tmp_path / "later" / "rank-00001.2.jsonl").write_text('{"t": 3, "name": "n"}\n')
    assert [record["t"] for record in follower.poll()] == [2, 3, 4]
    assert follower.poll() == []


def test_a_live_reader_sees_each_record_at_once(tmp_path: Path):
    telemetry.configure(tmp_path)
    follower = telemetry.follow(tmp_path)
    for number in range(3):
        telemetry.count("n", number)
        assert [record["value"] for record in follower.poll()] == [number]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_turns_it_off_with_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    telemetry.configure(tmp_path)
    telemetry.event("before")
    real, calls = os.write, []

    def write(fd: int, data: memoryview) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:10])  # a full disk often takes a part first

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(telemetry.os, "write", write)
        telemetry.event("lost")
        telemetry.event("lost")
    telemetry.event("lost")
    assert not telemetry.enabled()
    assert len(calls) == 2
    (said,) = told(caplog)
    assert said.startswith("telemetry is off")
    assert [record["name"] for record in telemetry.read(tmp_path)] == ["before"]


def test_a_disk_full_when_the_folder_is_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def mkdir(self: Path, **_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    telemetry.configure(tmp_path / "t")
    telemetry.event("lost")
    assert not telemetry.enabled()


def test_threads_do_not_mix_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.write
    monkeypatch.setattr(telemetry.os, "write", lambda fd, data: real(fd, data[:7]))
    telemetry.configure(tmp_path)

    def work() -> None:
        for number in range(100):
            telemetry.event("e", number=number)

    threads = [threading.Thread(target=work, name=f"w{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(record["thread"], record["number"]) for record in telemetry.read(tmp_path)]
    assert sorted(found) == [(f"w{i}", number) for i in range(4) for number in range(100)]


def test_a_forked_child_writes_a_file_of_its_own(tmp_path: Path):
    body = (
        f"telemetry.configure({str(tmp_path)!r}, rank=1)\n"
        "import os\n"
        "telemetry.event('parent')\n"
        "telemetry._sink._lock.acquire()\n"  # as another thread would hold it in mid-write
        "child = os.fork()\n"
        "if child == 0:\n"
        "    telemetry.event('child')\n"
        "    os._exit(0)\n"
        "telemetry._sink._lock.release()\n"
        "os.waitpid(child, 0)\n"
        "telemetry.event('parent')\n"
    )
    done = python(body)
    assert done.returncode == 0, done.stderr
    records = list(telemetry.read(tmp_path))
    assert [record["name"] for record in records] == ["parent", "child", "parent"]
    assert len({record["pid"] for record in records}) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_configuring_again_ends_the_first(tmp_path: Path):
    telemetry.configure(tmp_path / "a")
    span = telemetry.span("open")
    with span:
        telemetry.configure(tmp_path / "b")
        telemetry.event("second")
    assert list(telemetry.read(tmp_path / "a")) == []
    assert [record["name"] for record in telemetry.read(tmp_path / "b")] == ["second"]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"t": 1.0}',
        '{"t": NaN, "name": "x"}',
        '{"t": 1.0, "name": "x", "kind": "span"}',
        '{"t": 1.0, "name": "x", "kind": "span", "dur": Infinity}',
        '{"t": 1.0, "name": "x", "step": "7"}',
        '{"t": 1.0, "name": 3}',
    ],
)
def test_what_no_reader_could_use_is_skipped(tmp_path: Path, line: str, caplog):
    telemetry.configure(tmp_path, rank=0)
    with telemetry.span("save", step=None):
        pass
    telemetry.close()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(line + "\n" + file.read_text())
    assert [record["name"] for record in telemetry.read(tmp_path)] == ["save"]
    assert "no telemetry record" in caplog.text
