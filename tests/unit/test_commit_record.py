"""The record of commits: what is in it stays, what is torn goes, and what is wrong is told."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic import record
from planaria.elastic.record import Change, Commit, CommitLog
from planaria.errors import CorruptError, StateError, StorageError


def commit(step: int, generation: int = 1, members: tuple[int, ...] = (0, 1)) -> Commit:
    return Commit(
        step, generation, members, 8 * step, (0, step - 1), (1 / step).hex(),
        votes={"0": True}, digests={"w": f"d{step}"}, time=1.5,
    )  # fmt: skip


def test_entries_come_back_and_another_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "commits.jsonl"
    with CommitLog(path) as log:
        assert log.last is None
        assert log.append(Change(1, (0, 1), 0))
        assert log.append(commit(1))
        log.sync()
    with CommitLog(path) as log:
        assert log.last == commit(1)
        assert not log.append(commit(1))  # the writer before had come to it
        assert not log.append(Change(1, (0, 1), 0, time=3.0))
        assert log.append(Change(2, (1,), 1, lost=(0,), reason="SIGKILL", certificate="ab"))
        assert not log.append(Change(2, (1,), 1, lost=(0,), reason="SIGKILL", certificate="ab"))
        assert log.append(commit(2, 2, (1,)))
    entries = record.read(path)
    assert [e.kind for e in entries] == ["change", "commit", "change", "commit"]
    assert record.kept(entries) == {1: commit(1), 2: commit(2, 2, (1,))}
    assert not record.audit(entries)
    assert all(json.loads(line)["entry"]["kind"] for line in path.read_text().splitlines())


@given(st.integers(0, 200))
def test_a_torn_end_costs_one_entry_at_most(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.unlink(missing_ok=True)
    with CommitLog(path) as log:
        for step in range(1, 4):
            log.append(commit(step))
    whole = path.read_bytes()
    torn = whole[: len(whole) - cut]
    path.write_bytes(torn)
    left = record.read(path)
    assert left == [commit(s) for s in range(1, torn.count(b"\n") + 1)]
    with CommitLog(path) as log:
        for step in range(len(left) + 1, 4):
            assert log.append(commit(step))
    assert path.read_bytes() == whole


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    lines = b"".join(record._encode(commit(s)) for s in (1, 2, 3))
    at = data.draw(st.integers(0, len(lines) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda b: b != lines[at]))
    changed = lines[:at] + bytes([other]) + lines[at + 1 :]
    try:
        entries, _ = record._parse(Path("x"), changed)
    except CorruptError:
        return
    # Only the newline at the very end may go: then the last line is a torn one.
    assert (at, entries) == (len(lines) - 1, [commit(1), commit(2)])


def test_a_damaged_line_is_refused_by_readers_and_writers(tmp_path: Path) -> None:
    path = tmp_path / "commits.jsonl"
    with CommitLog(path) as log:
        log.append(commit(1))
        log.append(commit(2))
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":7'))
    for use in (record.read, CommitLog):
        with pytest.raises(CorruptError, match="line 1 is damaged"):
            use(path)


def test_the_order_is_held(tmp_path: Path) -> None:
    with CommitLog(tmp_path / "log") as log:
        log.append(Change(1, (0, 1), 0))
        log.append(commit(1))
        with pytest.raises(StateError, match="one is left out"):
            log.append(commit(3))
        with pytest.raises(StateError, match="committed again"):
            log.append(replace(commit(1), loss="0x0p+0"))
        with pytest.raises(StateError, match=r"generation 1 of members \[0, 2\]"):
            log.append(commit(2, members=(0, 2)))
        log.append(Change(3, (0,), 1))
        with pytest.raises(StateError, match="generation 2 comes after generation 3"):
            log.append(Change(2, (0,), 1))
        assert log.change == Change(3, (0,), 1)
        log.append(Change(1, (0, 1), 0))  # a restart of the whole job, from an older checkpoint
        assert log.last is None
        log.append(commit(1))


def test_going_back_takes_steps_away_and_their_second_coming_is_compared(tmp_path: Path) -> None:
    entries = [commit(1), commit(2), Change(2, (0, 1), 1), commit(2, 2)]
    assert list(record.kept(entries[:3])) == [1]
    assert record.kept(entries)[2].generation == 2
    assert not record.audit(entries)
    other = [*entries[:3], replace(commit(2, 2), loss=(0.25).hex())]
    (found,) = record.audit(other)
    assert "step 2 came out otherwise" in found
    (found,) = record.audit([commit(1), Change(2, (0,), 4)])
    assert found == "steps 2 to 4 are not in the record"


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CommitLog(tmp_path / "log") as log:
        log.append(commit(1))
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:10]))
        with pytest.raises(StorageError, match="make room"):
            log.append(commit(2))
        monkeypatch.undo()
        assert log.append(commit(2))
    assert len(record.read(tmp_path / "log")) == 2


def test_a_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        CommitLog(tmp_path / "none" / "log")
    with pytest.raises(StorageError, match="cannot be read"):
        record.read(tmp_path / "none")
