"""Ranks are killed in a snapshot in memory; others go on from there, bit for bit."""

import signal
from collections.abc import Iterator
from pathlib import Path

import memory_jobs
import pytest
from memory_jobs import Seen, live, newest_known, processes, runtime_folder
from ranks import RankDied, RankResult, try_ranks

from planaria.checkpoint import points

CAPTURE = points.SAVE[: points.SAVE.index(points.CAPTURE_END) + 1]
OF_RANK_0 = {points.SNAPSHOT_DESCRIBE, points.SNAPSHOT_DESCRIBED}
#: From here on the nodes finish a snapshot without their ranks.
DESCRIBED = [points.SNAPSHOT_DESCRIBED, points.SNAPSHOT_END]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


def run(tmp_path: Path, world: int, last: int, *args: object) -> list[RankResult]:
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    root = str(tmp_path / "root")
    return try_ranks(world, live, root, str(notes), last, *args, init_group=world > 1, timeout=120)


def values(results: list[RankResult]) -> list[Seen]:
    for result in results:
        assert result.error is None, result.error
        assert not result.value.wrong, result.value
    return [result.value for result in results]


@pytest.mark.parametrize("world", [1, 2])
def test_killed_ranks_go_on_from_memory(tmp_path: Path, world: int) -> None:
    first = run(tmp_path, world, 9, "", None, None, 4)
    assert all(isinstance(result.error, RankDied) for result in first)
    (node,) = processes()
    for seen in values(run(tmp_path, world, 6)):
        assert (seen.restored, seen.tier) == (4, "memory")
        assert seen.known == [5, 6]
        assert not seen.errors
        assert not seen.warned
    assert not list((tmp_path / "root").glob("step-*"))
    memory_jobs.eventually(lambda: not processes(), f"{node} ends with its job")


def check_kill(tmp_path: Path, point: str, rank: int) -> None:
    hit = ",hit=2" if point == points.CAPTURE_CHUNK else ""
    fault = f"kill@{point}:rank={rank},step=3{hit}"
    results = run(tmp_path, 2, 5, fault)
    assert results[rank].exitcode == -signal.SIGKILL
    (survivor,) = values([results[1 - rank]])
    assert len(survivor.errors) == 1
    known = newest_known(tmp_path / "notes")
    complete = point in DESCRIBED
    assert known in ((2, 3) if complete else (2,))
    for seen in values(run(tmp_path, 2, 4)):
        assert (seen.restored, seen.tier) == (3 if complete else 2, "memory")
        assert seen.known[-1] == 4
        assert not seen.errors


EACH = [
    (point, rank)
    for point in [*CAPTURE, *points.SNAPSHOT]
    for rank in range(1 if point in OF_RANK_0 else 2)
]
SOME = [
    (points.CAPTURE_CHUNK, 1),
    (points.SNAPSHOT_DESCRIBED, 0),
]


@pytest.mark.parametrize(
    ("point", "rank"),
    [each if each in SOME else pytest.param(*each, marks=pytest.mark.soak) for each in EACH],
)
def test_a_rank_killed_at(tmp_path: Path, point: str, rank: int) -> None:
    check_kill(tmp_path, point, rank)


def test_a_replaced_node_is_protected_at_once(tmp_path: Path) -> None:
    """Snapshots are rare, one node is lost after the other, and each time all of it is there."""
    memory = {"nodes": 3, "losses": 1, "every": 4}
    first = run(tmp_path, 3, 4, "", memory, None, 4)
    for node in ("n0", "n1"):
        assert all(isinstance(result.error, RankDied) for result in first)
        memory_jobs.kill({info.node: info for info in processes()}[node])
        # The ranks are gone again long before the next snapshot is due.
        first = run(tmp_path, 3, 5, "", memory, None, 5)
    memory_jobs.kill({info.node: info for info in processes()}["n2"])
    for seen in values(run(tmp_path, 3, 5, "", memory)):
        assert (seen.restored, seen.tier) == (4, "memory")
        assert not seen.errors
    # Nobody has begun anew and come to step 4 again.
    assert [file.read_text() for file in (tmp_path / "notes").glob("known-*")] == ["4\n"] * 3
    assert not list((tmp_path / "root").glob("step-*"))


def test_two_nodes_of_four_are_lost_at_once(tmp_path: Path) -> None:
    """Their ranks and their snapshot processes: what survives has all of it."""
    memory = {"nodes": 4, "losses": 2}
    first = run(tmp_path, 4, 9, "", memory, None, 3)
    assert all(isinstance(result.error, RankDied) for result in first)
    nodes = {info.node: info for info in processes()}
    assert sorted(nodes) == ["n0", "n1", "n2", "n3"]
    for node in ("n1", "n2"):
        memory_jobs.kill(nodes[node])
    for seen in values(run(tmp_path, 4, 5, "", memory)):
        assert (seen.restored, seen.tier) == (3, "memory")
        assert seen.known == [4, 5]
        assert not seen.errors
    assert not list((tmp_path / "root").glob("step-*"))
