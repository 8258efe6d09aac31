"""Notices are seen wherever they come from, and what is done fits into the grace."""

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic.grace import WAYS, Meter, choose
from planaria.elastic.preemption import (
    Leaving,
    Notice,
    Notices,
    OnFile,
    OnPoll,
    OnSignal,
    agree,
    slurm,
    url_notice,
)
from planaria.elastic.way_out import _choose
from planaria.errors import ConfigError


def eventually(notices: Notices) -> Notice:
    until = time.monotonic() + 60
    while (found := notices.look()) is None:
        assert time.monotonic() < until, "no notice"
        time.sleep(0.005)
    return found


def test_a_signal_is_a_notice_and_others_hear_of_it() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda n, f: heard.append(n))
    try:
        with Notices(OnSignal(signal.SIGUSR2, grace_s=100)) as notices:
            assert notices.look() is None
            os.kill(os.getpid(), signal.SIGUSR2)
            found = eventually(notices)
            assert found.source == "SIGUSR2"
            assert 0 < found.grace_s <= 100
            os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == [signal.SIGUSR2] * 2
            assert notices.look() == found
        os.kill(os.getpid(), signal.SIGUSR2)
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_sigterm_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Notices() as notices:
            os.kill(os.getpid(), signal.SIGTERM)
            eventually(notices)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_handlers_are_set_in_the_main_thread_only() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            OnSignal(signal.SIGUSR2).open()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 20, 30),
        ("12", 2, 12),
        ('{"grace_s": 90}', 80, 90),
        ("not json", 20, 30),
        ("[" * 9000, 20, 30),
        ("1" * 400, 20, 30),
        ("-5", 20, 30),
    ],
)
def test_a_file_is_a_notice(tmp_path: Path, text: str, least: float, most: float) -> None:
    with Notices(OnFile(tmp_path / "leave", grace_s=30)) as notices:
        assert notices.look() is None
        (tmp_path / "leave").write_text(text)
        assert 0 <= eventually(notices).grace_s <= most
        (tmp_path / "leave").unlink()
        assert notices.look() is not None


def test_a_file_that_cannot_be_read_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another user's, such as the machine's own service."""
    (tmp_path / "leave").write_text("5")

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    assert eventually(Notices(OnFile(tmp_path / "leave", grace_s=300))).grace_s > 100


def test_sources_may_be_opened_twice_and_again() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        once = Notices(OnSignal(signal.SIGUSR2))
        with once, once:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert eventually(once).source == "SIGUSR2"
    finally:
        signal.signal(signal.SIGUSR2, before)
    answers = [None] * 3
    again = Notices(OnPoll(lambda: answers.pop() if answers else True, every_s=0.001))
    with again:
        pass
    answers += [None] * 3
    with again:
        eventually(again)


def test_of_an_old_file_little_is_left(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    path.touch()
    os.utime(path, (0.0, time.time() - 1000))
    assert eventually(Notices(OnFile(path, grace_s=30))).grace_s == 0


def test_what_is_polled_may_fail_and_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([OSError("no route"), OSError("no route"), None, False, 40.0])

    def ask() -> float | bool | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    sources = (OnPoll(ask, every_s=0.001, name="cloud"), OnPoll(lambda: True, 0.001, grace_s=99))
    with Notices(*sources) as notices:
        until = time.monotonic() + 60
        while (found := eventually(notices)).source != "cloud":
            assert time.monotonic() < until
        assert 0 < found.grace_s <= 40  # the shorter of the two
    assert [r.getMessage() for r in caplog.records].count(
        "asking cloud for a notice failed: no route"
    ) == 1


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, tuple[int, str]]]]:
    replies: dict[str, tuple[int, str]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, text = replies.get(self.path, (404, ""))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None: ...  # pyright: ignore

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", replies
    server.shutdown()
    server.server_close()
    thread.join(60)


def test_a_metadata_service_is_asked(metadata: tuple[str, dict[str, tuple[int, str]]]) -> None:
    url, replies = metadata
    ask = url_notice(url + "/spot", {"Metadata-Flavor": "Google"})
    assert ask() is None  # 404
    for text in ("FALSE", "NONE", ""):
        replies["/spot"] = (200, text)
        assert ask() is None
    replies["/spot"] = (200, "TRUE")
    assert ask() is True
    end = datetime.now(UTC) + timedelta(seconds=100)
    replies["/spot"] = (200, json.dumps({"action": "terminate", "time": end.isoformat()}))
    left = ask()
    assert isinstance(left, float)
    assert 0 < left <= 100
    replies["/spot"] = (500, "broken")
    with pytest.raises(OSError, match="500"):
        ask()
    with pytest.raises(ConfigError, match="no http address"):
        url_notice("file:///etc/passwd")


def test_slurm_tells_by_signal_and_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert len(slurm()) == 2
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 50))
    with Notices(*slurm(signal.SIGUSR2, grace_s=60)) as notices:
        found = eventually(notices)
        assert "SLURM" in found.source
        assert found.grace_s <= 50


def test_all_agree_on_who_leaves() -> None:
    assert agree({0: None, 1: None}) is None
    assert agree({2: 30.0, 0: None, 1: 20.0}) == Leaving((1, 2), (0,), 20.0)
    assert agree({0: -1.0}) == Leaving((0,), (), 0.0)


SIZES = {"hand_over": 100, "parity": 300, "storage": 1000}
RATES = {"hand_over": 100.0, "parity": 100.0, "storage": 100.0}


@pytest.mark.parametrize(
    ("grace", "leave_out", "way"),
    [
        (60, (), "hand_over"),
        (1.7, (), "hand_over"),  # 0.2 s and one and a half times one second
        (1.69, (), None),
        (60, ("hand_over",), "parity"),
        (4.7, ("hand_over",), "parity"),
        (60, ("hand_over", "parity"), "storage"),
        (15.1, ("hand_over", "parity"), None),
        (60, WAYS, None),
        (0, (), None),
        (-5, (), None),
    ],
)
def test_the_best_way_that_fits_is_taken(
    grace: float, leave_out: tuple[str, ...], way: str | None
) -> None:
    sizes = {k: v for k, v in SIZES.items() if k not in leave_out}
    made = choose(grace, sizes, RATES, unsaved_steps=7)  # pyright: ignore[reportArgumentType]
    assert made.way == way
    assert made.lost_steps == (7 if way is None else 0)
    assert ("7 steps" in made.says) == (way is None)


def test_a_slow_first_way_yields_to_a_fast_second() -> None:
    made = choose(5, {"hand_over": 1000, "storage": 100}, {"hand_over": 10, "storage": 100})
    assert made.way == "storage"


def test_what_was_never_measured_is_tried_last() -> None:
    made = choose(5, {"hand_over": 100, "storage": 100}, {"storage": 100.0})
    assert made.way == "storage"
    made = choose(5, {"hand_over": 100, "storage": 1000}, {"storage": 1.0})
    assert (made.way, made.expected_s) == ("hand_over", None)
    assert "never timed" in made.says


def test_nothing_to_move_takes_no_time() -> None:
    assert choose(0.2, {"hand_over": 0}, {}).way == "hand_over"


@given(st.floats(0, 100), st.floats(0, 100), st.integers(0, 10**6), st.floats(1, 1e6))
def test_more_grace_never_chooses_a_worse_way(a: float, b: float, n: int, rate: float) -> None:
    order = [*WAYS, None]
    short, long = (
        choose(g, {"hand_over": 3 * n, "storage": n}, {"hand_over": rate, "storage": rate})
        for g in sorted((a, b))
    )
    assert order.index(long.way) <= order.index(short.way)
    if long.expected_s is not None:
        assert long.expected_s <= max(a, b)


@pytest.mark.parametrize(
    "bad",
    [
        ((1, {"storage": -1}, {}), {}),
        ((1, {}, {"storage": 0.0}), {}),
        ((float("nan"), {}, {}), {}),
        ((1, {}, {}), {"safety": 0.5}),
    ],
)
def test_numbers_that_make_no_sense_are_refused(bad: tuple) -> None:
    with pytest.raises(ConfigError):
        choose(*bad[0], **bad[1])


def test_the_meter_relies_on_what_most_transfers_reached() -> None:
    meter = Meter(keep=8)
    assert meter.bandwidths() == dict.fromkeys(WAYS)
    for rate in (100.0, 50.0, 200.0, 400.0, 300.0):
        meter.add("storage", 1000, 1000 / rate)
    meter.add("storage", 1, 10.0)  # tells of a delay, not of a speed
    meter.add("storage", 0, 10.0)
    assert meter.bandwidths()["storage"] == pytest.approx(100.0)
    for _ in range(8):
        meter.add("storage", 1000, 1.0)
    assert meter.bandwidths()["storage"] == pytest.approx(1000.0)  # what was long ago is forgotten
    with meter.time("parity", 10):
        pass
    assert (meter.bandwidths()["parity"] or 0) > 0
    with pytest.raises(RuntimeError), meter.time("hand_over", 10):
        raise RuntimeError
    assert meter.bandwidths()["hand_over"] is None


def said(grace_s: float | None, *, speeds: dict[str, float] | None = None, **sizes: int) -> Any:
    return {"grace_s": grace_s, "sizes": sizes, "speeds": speeds or {}, "begun": [], "unsaved": 4}


def test_all_members_choose_by_the_slowest_and_the_busiest() -> None:
    one = said(None, hand_over=10, storage=10, speeds={"hand_over": 100.0, "storage": 1.0})
    other = said(3.0, hand_over=200, storage=10, speeds={"hand_over": 200.0, "storage": 20.0})
    assert _choose(9.0, [one, other], handed=True).expected_s == pytest.approx(2.0)
    assert _choose(3.0, [one, other], handed=True).way is None
    # One has no storage to flush to: all need it.
    alone = said(3.0, hand_over=0, speeds={"hand_over": 400.0})
    assert _choose(3.0, [other, alone], handed=True).way == "hand_over"


def test_memory_is_the_last_resort_where_all_go() -> None:
    """Their nodes may go with them."""
    speeds = {"parity": 100.0, "storage": 10.0}
    everybody = [said(9.0, parity=10, storage=10, speeds=speeds)] * 2
    assert _choose(9.0, everybody, handed=False).way == "storage"
    assert _choose(1.0, everybody, handed=False).way == "parity"
    assert _choose(9.0, everybody, handed=True).way == "parity"
