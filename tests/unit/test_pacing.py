import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.errors import ConfigError, DeadlineError

EPS = 1e-4


class FakeTime:
    """A clock that moves when somebody pauses on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def pause(self, _: threading.Condition, seconds: float) -> None:
        self.now += seconds

    def bucket(self, rate: float, burst: float) -> TokenBucket:
        return TokenBucket(rate, burst, clock=self.clock, pause=self.pause)

    def deadline(self, seconds: float = 1e9) -> Deadline:
        return Deadline(seconds, clock=self.clock)


def grants(time: FakeTime, bucket: TokenBucket, takes: list[tuple[int, float]]):
    """Takes (bytes, idle seconds before) in turn; returns (when, bytes) of each."""
    found = []
    for n, idle in takes:
        time.now += idle
        bucket.take(n, time.deadline())
        found.append((time.now, n))
    return found


def check_rate(found: list[tuple[float, int]], rate: float, burst: float) -> None:
    """In no window of time do the grants exceed burst + rate * its length."""
    for first in range(len(found)):
        total = 0
        for when, n in found[first:]:
            total += n
            allowed = burst + rate * (when - found[first][0])
            assert total <= allowed * (1 + 1e-9) + EPS * max(1, rate * 1e-6)


RATES = st.floats(1, 1e9)
TAKES = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 5)), min_size=1, max_size=20)


@given(rate=RATES, takes=TAKES)
def test_never_exceeds_the_rate_in_any_window(rate: float, takes: list[tuple[int, float]]):
    time = FakeTime()
    check_rate(grants(time, time.bucket(rate, 1000), takes), rate, 1000)


@given(rate=RATES, takes=TAKES, burst=st.integers(1, 50))
def test_takes_beyond_the_burst_keep_the_rate_over_time(rate, takes, burst):
    time = FakeTime()
    total = 0
    for when, n in grants(time, time.bucket(rate, burst), takes):
        total += n
        assert total <= burst + rate * when * (1 + 1e-9) + EPS * max(1, rate * 1e-6)


@given(rate=RATES, takes=TAKES)
def test_never_waits_longer_than_it_must(rate, takes):
    time = FakeTime()
    grants(time, time.bucket(rate, 1000), takes)
    least = max(0, sum(n for n, _ in takes) - 1000) / rate
    idle = sum(seconds for _, seconds in takes)
    assert time.now <= least + idle + len(takes) * 1e-5 + 1e-6 * time.now


def test_a_bucket_that_forgets_what_was_taken_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def refill(self: TokenBucket) -> None:
        self._tokens = self._burst

    monkeypatch.setattr(TokenBucket, "_fill", refill)
    time = FakeTime()
    with pytest.raises(AssertionError):
        check_rate(grants(time, time.bucket(10, 1000), [(900, 0.0)] * 3), 10, 1000)


def test_a_full_bucket_gives_its_burst_at_once_and_no_more_after_a_long_idle():
    time = FakeTime()
    bucket = time.bucket(100, 50)
    time.now += 1e6
    bucket.take(50, time.deadline())
    assert time.now == 1e6
    bucket.take(50, time.deadline())
    assert time.now == pytest.approx(1e6 + 0.5)


def test_giving_up_takes_nothing():
    time = FakeTime()
    bucket = time.bucket(10, 100)
    bucket.take(100, time.deadline())
    with pytest.raises(DeadlineError, match="80 bytes at 10 bytes/s"):
        bucket.take(80, time.deadline(5))
    assert time.now == pytest.approx(5)
    bucket.take(50, time.deadline(0.001))  # what 5 s have filled is all there
    with pytest.raises(DeadlineError):
        bucket.take(1, time.deadline(0))


def test_a_new_rate_reaches_those_who_wait():
    time = FakeTime()
    bucket: TokenBucket

    def pause(condition: threading.Condition, seconds: float) -> None:
        time.now += 1
        bucket.rate = 1000

    bucket = TokenBucket(1, 10, clock=time.clock, pause=pause)
    bucket.take(10, time.deadline())
    bucket.take(10, time.deadline())
    assert (time.now, bucket.rate) == (2, 1000)


def test_no_limit():
    time = FakeTime()
    bucket = time.bucket(math.inf, 1)
    bucket.take(10**15, time.deadline(0.1))
    assert time.now == 0
    bucket.rate = 10
    bucket.take(1, time.deadline())
    bucket.take(1, time.deadline())
    assert time.now == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0, -1, math.nan, None, "10"])
def test_refuses_a_rate_that_is_none(rate):
    with pytest.raises(ConfigError, match="rate"):
        TokenBucket(rate, 10)
    bucket = TokenBucket(1, 10)
    with pytest.raises(ConfigError, match="rate"):
        bucket.rate = rate


def test_refuses_other_nonsense():
    with pytest.raises(ConfigError, match="burst"):
        TokenBucket(10, 0)
    with pytest.raises(ConfigError, match="-1 bytes"):
        TokenBucket(10, 10).take(-1, Deadline(1))


def test_many_threads_share_one_rate():
    bucket = TokenBucket(1_000_000, 1000)
    done: list[int] = []

    def work() -> None:
        for _ in range(25):
            bucket.take(500, Deadline(60))
            done.append(500)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 50_000
    with pytest.raises(DeadlineError):  # a waiting thread leaves no place in the queue behind
        bucket.take(10**9, Deadline(0.01))
    bucket.take(1, Deadline(60))


def test_waiting_threads_are_served_in_turn():
    time = FakeTime()
    served: list[str] = []
    waiting = threading.Event()
    second = threading.Thread(
        target=lambda: (bucket.take(1, Deadline(60)), served.append("second"))
    )

    def pause(condition: threading.Condition, seconds: float) -> None:
        if not waiting.is_set():
            waiting.set()
            second.start()
        condition.wait(0.01)  # lets the second queue up
        if len(bucket._queue) > 1 or served:
            time.now += seconds

    bucket = TokenBucket(10, 10, clock=time.clock, pause=pause)
    bucket.take(10, time.deadline())
    bucket.take(5, time.deadline())
    served.append("first")
    second.join()
    assert served == ["first", "second"]
