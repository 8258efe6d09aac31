"""Content addressing with several ranks: each refers to its own part, at any world size."""

from pathlib import Path
from typing import Any

from mixture import ALL_NBYTES, SMALL, Mixture, begin, check_stored, orphans, save, states
from ranks import run_ranks

from planaria.checkpoint import open_checkpoint
from planaria.core.points import armed


def trains(rank: int, path: str, last: int, overlap: bool = False) -> list[tuple[int, Any]]:
    """Saves up to a step; what this rank has written at each, and what was saved."""
    model, done = Mixture(), []
    with begin(path, model, keep=2) as ckpt:
        report = ckpt.restore()
        for step in range(report.step + 1 if report else 1, last + 1):
            ckpt.before_update()
            model.touch(step % 8)
            if overlap:
                ckpt.save(step)
                done.append((0, model.copy()))
            else:
                done.append(save(ckpt, model, step))
    return done


def written(results: list[Any], save: int) -> int:
    return sum(result[save][0] for result in results)


def test_at_any_number_of_ranks(tmp_path: Path) -> None:
    root = tmp_path / "root"
    first = run_ranks(2, trains, str(root), 3)
    assert min(result[0][0] for result in first) > ALL_NBYTES // 4, "not balanced"
    assert ALL_NBYTES <= written(first, 0) <= ALL_NBYTES + 2 * SMALL
    assert written(first, 1) < ALL_NBYTES // 4
    check_stored(root, {2: first[0][1][1], 3: first[1][2][1]})
    assert states(root)[1] == "referenced"
    # One rank goes on with what two have written, and two with what one has.
    for world, last in ((1, 5), (2, 6)):
        now = run_ranks(world, trains, str(root), last)
        check_stored(root, {last: now[0][-1][1]})
        assert not orphans(root)
        # What boxes there are does not hang on the ranks: both kinds of file are referred to.
        assert any(f.step == 1 for f in open_checkpoint(root, last).manifest.files)


def delayed(rank: int, path: str) -> None:
    """Rank 1 learns late of each commit."""
    pause = "sleep=0.05@checkpoint.record:times=inf" if rank else ""
    with armed(pause):
        done = trains(rank, path, 6, overlap=True)
    if rank == 0:
        check_stored(Path(path), {6: done[-1][1]})


def test_ranks_that_are_a_commit_apart(tmp_path: Path) -> None:
    run_ranks(2, delayed, str(tmp_path / "root"))
