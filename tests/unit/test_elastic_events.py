"""Changes of the ranks, put together from what the launcher and rank 0 noted."""

import pytest

from planaria.errors import ConfigError
from planaria.launch import elastic_events, elastic_picture, metrics
from planaria.launch.elastic_events import FENCED, GENERATION, LOST, EventsWriter, transitions
from planaria.launch.metrics import StepRecord
from planaria.launch.perfetto import chrome_trace


def step(number: int, end: float, loss: float = 1.0) -> StepRecord:
    return StepRecord(number, loss, loss.hex(), 64, 1.0, 0.1, 0, end)


def view(time: float, generation: int, members: list[int], at: int | None = None):
    return {
        "time": time,
        "kind": GENERATION,
        "generation": generation,
        "members": members,
        "step": at,
    }


def test_a_loss_and_a_replacement_are_two_changes():
    events = [
        view(0.0, 1, [0, 1, 2, 3]),
        {"time": 10.5, "kind": LOST, "member": 1},
        view(10.6, 2, [0, 2, 3], 10),
        {"time": 20.0, "kind": "asks", "member": 4},
        view(20.1, 3, [0, 2, 3, 4], 19),
    ]
    records = [step(n, float(n)) for n in range(1, 11)]
    records += [step(n, n + 1.25) for n in range(11, 25)]
    lost, joined = transitions(events, records)
    assert (lost.lost, lost.joined, lost.world_size, lost.step) == ((1,), (), 3, 10)
    assert lost.agreed_s == pytest.approx(0.1)
    assert lost.gap_s == pytest.approx(12.25 - 10.0 - 1.0)
    assert (joined.lost, joined.joined, joined.world_size) == ((), (4,), 4)
    assert joined.agreed_s is None
    assert joined.gap_s == pytest.approx(0.0)


def test_a_change_that_nothing_followed_has_no_gap():
    events = [view(0.0, 1, [0, 1]), {"time": 5.0, "kind": FENCED, "member": 1},
              view(6.0, 2, [0], 5)]  # fmt: skip
    (change,) = transitions(events, [step(n, float(n)) for n in range(1, 6)])
    assert change.gap_s is None
    assert change.agreed_s == pytest.approx(1.0)


def test_another_attempt_begins_anew():
    events = [view(0.0, 1, [0, 1]), view(9.0, 1, [0, 1, 2])]
    assert transitions(events, []) == []


def test_what_is_written_is_read_and_what_is_torn_is_left_out(tmp_path):
    path = tmp_path / "elastic.jsonl"
    assert elastic_events.read(path) == []
    writer = EventsWriter(path)
    writer.write(LOST, {"member": 2, "how": "SIGKILL", "at": 5.0})
    writer.close()
    with path.open("ab") as file:
        file.write(b'[1]\n{"kind": "generation", "tim')
    (event,) = elastic_events.read(path)
    assert (event["kind"], event["member"], event["time"]) == (LOST, 2, 5.0)


def test_ranks_live_from_their_first_view_to_their_loss(tmp_path):
    events = [
        view(0.0, 1, [0, 1, 2]),
        {"time": 4.5, "kind": LOST, "member": 1},
        view(5.0, 2, [0, 2], 4),
        view(8.0, 3, [0, 2, 3], 7),
        view(9.0, 4, [2, 3], 8),
    ]
    found = [(x.member, x.start, x.end, x.lost) for x in elastic_picture.lives(events, 12.0)]
    assert found == [(0, 0.0, 9.0, False), (1, 0.0, 4.5, True), (2, 0.0, 12.0, False),
                     (3, 8.0, 12.0, False)]  # fmt: skip
    picture = tmp_path / "ranks.png"
    steps = [step(n, float(n)) for n in range(1, 12)]
    elastic_picture.draw_session(events, steps, steps, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    trace = chrome_trace([], [], events)["traceEvents"]
    assert [e["name"] for e in trace if e.get("cat") == "elastic"][1] == "lost 1"
    with pytest.raises(ConfigError, match="no elastic session"):
        elastic_picture.draw_session([], steps, [], picture)


def test_losses_are_compared_bit_by_bit():
    one = metrics.kept([step(1, 1.0, 0.5), step(2, 2.0, 0.25), step(3, 3.0)])
    other = metrics.kept([step(1, 1.0, 0.5), step(2, 2.0, 0.25 + 2**-54)])
    assert metrics.equal_losses(one, other) == (2, 1)
