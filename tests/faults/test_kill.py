"""SIGKILL at every named point of a save, and at any other time, to any rank.

After each, a restore brings back exactly the state after some committed step, never an older one
than the newest whose commit any rank knew of; all that is committed verifies; training goes on.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from fault_job import Job, Life, check_survival, live, make_checkpointer, newest_known
from ranks import RankDied, RankResult, try_ranks

from planaria.checkpoint import points
from planaria.core.points import arm

KEEP = 2
#: The first save, a later one, and one after which an old checkpoint is removed.
SAVES = (1, 2, 4)
LAST = 6
# Only rank 0 commits and removes.
OF_RANK_0 = set(points.SAVE[points.SAVE.index(points.MANIFEST_BEGIN) :])
# From here on the killed save is found by a restore: SIGKILL leaves the page cache as it is.
EXISTS_FROM = points.SAVE.index(points.MANIFEST_RENAMED)

MATRIX = [
    (point, rank, save, world)
    for world in (1, 2)
    for point in points.SAVE
    for rank in range(1 if point in OF_RANK_0 else world)
    for save in SAVES
    if not (point == points.RETENTION_UNLISTED and save <= KEEP)
]


def covering() -> list[tuple[str, int, int, int]]:
    """Every point in every rank that passes it, the saves in turn."""
    pairs = dict.fromkeys((point, rank) for point, rank, _, world in MATRIX if world == 2)
    saves = (4 if point == points.RETENTION_UNLISTED else None for point, _ in pairs)
    return [
        (point, rank, save or SAVES[i % len(SAVES)], 2)
        for i, ((point, rank), save) in enumerate(zip(pairs, saves, strict=True))
    ]


def kill_at(point: str, rank: int, save: int) -> str:
    """The fault that kills a rank at a point of its n-th save."""
    if point == points.RETENTION_UNLISTED:
        return f"kill@{point}:rank={rank},step={save - KEEP}"  # this point names the step that goes
    hit = ",hit=2" if point.endswith(".chunk") else ""
    return f"kill@{point}:rank={rank},step={save}{hit}"


def check_kill(tmp_path: Path, point: str, rank: int, save: int, world: int) -> None:
    root, notes = tmp_path / "root", tmp_path / "notes"
    notes.mkdir()
    results = try_ranks(
        world,
        live,
        str(root),
        str(notes),
        LAST,
        kill_at(point, rank, save),
        KEEP,
        init_group=world > 1,
    )
    check_dead(results, {rank})
    known = newest_known(notes)
    written = save if points.SAVE.index(point) >= EXISTS_FROM else save - 1
    assert known in (written, written - 1), f"killed at step {save}, known until {known}"
    if rank == 1:  # the survivors' world first
        for result in try_ranks(world, live, str(root), str(notes), written + 1, "", KEEP):
            check_alive(result)
            assert result.value.restored == (written or None)
            assert not result.value.errors
        written += 1
        assert newest_known(notes) == written
    assert check_survival(root, newest_known(notes), keep=KEEP) == written


def check_dead(results: list[RankResult], victims: set[int]) -> None:
    """The victims died by the signal, the others ended by themselves, with one clear error."""
    for result in results:
        if result.rank in victims:
            assert isinstance(result.error, RankDied), result
            assert result.exitcode == -signal.SIGKILL
        else:
            check_alive(result)
            assert len(result.value.errors) == 1
            assert result.value.errors[0].startswith(("SaveFailedError", "CollectiveError"))


def check_alive(result: RankResult) -> None:
    assert result.error is None, result.error
    assert isinstance(result.value, Life)
    assert not result.value.wrong, result.value


@pytest.mark.parametrize(("point", "rank", "save", "world"), covering())
def test_kill_at_point(tmp_path: Path, point: str, rank: int, save: int, world: int) -> None:
    check_kill(tmp_path, point, rank, save, world)


@pytest.mark.soak
@pytest.mark.parametrize(("point", "rank", "save", "world"), MATRIX)
def test_kill_matrix(tmp_path: Path, point: str, rank: int, save: int, world: int) -> None:
    check_kill(tmp_path, point, rank, save, world)


def test_every_point_is_covered() -> None:
    assert {(point, rank) for point, rank, _, _ in covering()} >= {
        *((point, 0) for point in points.SAVE),
        *((point, 1) for point in points.SAVE if point not in OF_RANK_0),
    }
    assert {save for _, _, save, _ in covering()} == set(SAVES)


def saves_again(rank: int, path: str, point: str) -> None:
    """Is killed when step 2 is saved for the second time."""
    job = Job()
    ckpt = make_checkpointer(path, job)
    for step in (1, 2):
        job.advance()
        ckpt.save(step).wait_committed()
    arm(f"kill@{point}:step=2")
    with ckpt:
        ckpt.save(2).wait_committed()


OF_SAVE = [point for point in points.SAVE if point != points.RETENTION_UNLISTED]
SOME = (points.WRITE_CHUNK, points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED, points.COMMITTED)


@pytest.mark.parametrize(
    "point", [p if p in SOME else pytest.param(p, marks=pytest.mark.soak) for p in OF_SAVE]
)
def test_kill_while_a_step_is_saved_again(tmp_path: Path, point: str) -> None:
    """It exists all the time; what the loser of the two attempts left is cleared up."""
    (result,) = try_ranks(1, saves_again, str(tmp_path / "root"), point, init_group=False)
    assert result.exitcode == -signal.SIGKILL
    assert check_survival(tmp_path / "root", 2) == 2


def check_random_kills(tmp_path: Path, seed: int, kills: int) -> None:
    """Several lives of one run, each ended at a random time; saves overlap and old ones go."""
    rng = random.Random(seed)
    root, notes = tmp_path / "root", tmp_path / "notes"
    notes.mkdir()
    for kill in range(kills):
        world = rng.choice((1, 2))
        victims = set(rng.choice(((0,), (world - 1,), range(world))))
        for started in notes.glob("started-*"):
            started.unlink()
        killer = threading.Thread(target=_kill_soon, args=(notes, victims, rng.uniform(0, 0.25)))
        killer.start()
        results = try_ranks(
            world,
            live,
            str(root),
            str(notes),
            newest_known(notes) + 5000,  # until it is killed
            "",
            rng.choice((1, KEEP, None)),
            bool(kill % 2),
            init_group=world > 1,
        )
        killer.join()
        for result in results:
            if result.rank in victims:
                assert result.exitcode == -signal.SIGKILL, result
            elif result.exitcode != -signal.SIGKILL:
                check_alive(result)
    check_survival(root, newest_known(notes), keep=KEEP)


def _kill_soon(notes: Path, victims: set[int], delay: float) -> None:
    until = time.monotonic() + 60
    while len(list(notes.glob("started-*"))) <= max(victims) and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(delay)
    pids = [int((notes / f"pid-{rank}").read_text()) for rank in victims]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none ends by the loss of another
        for pid in pids:
            os.kill(pid, number)


@pytest.mark.parametrize("seed", range(2))
def test_random_kills(tmp_path: Path, seed: int) -> None:
    check_random_kills(tmp_path, seed, kills=5)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_random_kills(tmp_path: Path, seed: int) -> None:
    check_random_kills(tmp_path, seed, kills=20)
