"""Sessions with checkpoints, a record, and members that have to go."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from memory_jobs import runtime_folder
from ranks import run_ranks
from reductions import Net
from sessions import Kind, Outcome, alone, check, run

from planaria.checkpoint import Checkpointer
from planaria.elastic.membership.rules import Rules
from planaria.elastic.record import audit, kept, read
from planaria.elastic.stored import join_blocks
from planaria.errors import RootError, StateError, StoppedError

KIND = Kind(steps=7)
WHOLE = Kind(steps=7, options={"zero_stage": 0})


@cache
def reference(whole: bool = False) -> Outcome:
    return alone(WHOLE if whole else KIND)


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_that_stopped_is_restored_by_another_number_of_ranks(
    tmp_path: Path, whole: bool
) -> None:
    kind = replace(WHOLE if whole else KIND, folder=str(tmp_path))
    for result in run(2, replace(kind, stop_at=3)).values():
        assert result.error is None
        assert len(result.value.steps) == 4, "the stop was agreed"
    check(run(3, kind), reference(whole), joined=range(3))


def restore_plain(rank: int, folder: str) -> list[torch.Tensor]:
    """A plain optimizer, from blocks; returns the slots of one parameter that was cut."""
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Checkpointer(folder, {"model": model, "optim": optimizer}) as ckpt:
        report = ckpt.restore(only=["model", "optim"], transforms=[join_blocks])
    assert report is not None
    assert report.step == 7
    state = optimizer.state[model.embed.weight]
    assert state["step"].item() == 7
    assert state["exp_avg"].shape == model.embed.weight.shape
    return [p.detach() for p in model.parameters()]


def test_a_plain_optimizer_restores_what_a_session_saved(tmp_path: Path) -> None:
    results = run(2, replace(KIND, folder=str(tmp_path)))
    check(results, reference())
    (found,) = run_ranks(1, restore_plain, str(tmp_path), init_group=False)
    bits = [p.numpy().tobytes() for p in found]
    assert bits == list(results[0].value.parameters.values())


def test_more_losses_than_shadows_go_back_to_what_was_saved(tmp_path: Path) -> None:
    kind = replace(KIND, folder=str(tmp_path), options={"redundancy": 0}, wait_for={5: 2})
    results = run(3, kind, {1: "kill@elastic.session.backward:step=5"})
    for me in (0, 2):
        outcome = results[me].value
        assert outcome.parameters == reference().parameters
        numbers = [number for number, _ in outcome.attempts]
        assert numbers[:6] == [0, 1, 2, 3, 4, 5]
        assert numbers[6:] in ([2, 3, 4, 5, 6], [4, 5, 6]), "the steps since are done again"


def test_more_losses_than_shadows_go_back_to_the_last_snapshot_in_memory(tmp_path: Path) -> None:
    kind = replace(KIND, folder=str(tmp_path / "ckpt"), every=100, snapshots=1)
    kind = replace(kind, options={"redundancy": 0})
    with runtime_folder(tmp_path / "runtime"):
        results = run(3, kind, trick="dies once step 4 is in memory")
    check(results, reference(), dead=[1])
    numbers = [number for number, _ in results[0].value.attempts]
    assert numbers in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 4, 5, 6]), "from step 4"


def test_a_member_lost_while_the_checkpointer_is_attached_anew(tmp_path: Path) -> None:
    """Those that wait for it there are woken, or all would be taken for hung, and killed."""
    kind = replace(KIND, folder=str(tmp_path), options={"redundancy": 2})
    faults = {1: "kill@elastic.session.backward:step=3"}
    results = run(4, kind, faults, trick="dies as it attaches")
    check(results, reference(), dead=[1, 2])


def test_a_member_lost_with_the_last_save(tmp_path: Path) -> None:
    """The others save without it; nothing of the run's end is lost."""
    kind = replace(KIND, folder=str(tmp_path), every=100)
    check(run(3, kind, trick="dies with the last save"), reference(), dead=[2])
    assert sorted(int(p.name.removeprefix("step-")) for p in tmp_path.glob("step-*")) == [7]


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def test_too_few_that_are_left_save_what_they_have_and_stop(tmp_path: Path) -> None:
    """What was committed since the last save is not lost with the job."""
    kind = replace(KIND, folder=str(tmp_path), every=100)
    rules = Rules(2, minimum=2, wait_for_joiners=False)
    results = run(2, kind, {1: "kill@elastic.session.backward:step=3"}, rules=rules)
    assert isinstance(results[0].error, StoppedError)
    assert "are the least" in str(results[0].error)
    assert saved(tmp_path) == [3]
    check(run(2, kind), reference(), joined=[0, 1])


def test_the_last_save_is_not_missed_where_somebody_joins_at_the_end(tmp_path: Path) -> None:
    """One that joins in the recovery from the last step's loss has nothing that it could save."""
    kind = replace(KIND, folder=str(tmp_path / "ckpt"), every=100)
    faults = {1: "kill@elastic.session.committed:step=6"}
    results = run(3, kind, faults, joiners=1, late=6, trick="comes once it is waited for")
    check(results, reference(), dead=[1], joined=[3])
    assert results[3].value.steps == []
    assert saved(tmp_path / "ckpt") == [7]
    (found,) = run_ranks(1, restore_plain, str(tmp_path / "ckpt"), init_group=False)
    assert [p.numpy().tobytes() for p in found] == list(reference().parameters.values())


def test_one_that_joins_and_saves_elsewhere_is_refused(tmp_path: Path) -> None:
    """Else every step since would be committed without its part. The others go on."""
    kind = replace(KIND, folder=str(tmp_path))
    results = run(2, kind, joiners=1, late=2, trick="saves elsewhere")
    refused = results.pop(2).error
    assert isinstance(refused, RootError)
    assert "give all ranks one that they share" in str(refused)
    check(results, reference())


def test_the_record_knows_every_step_and_every_change(tmp_path: Path) -> None:
    kind = replace(KIND, record=str(tmp_path / "record"), folder=str(tmp_path / "ckpt"))
    faults = {0: "kill@elastic.session.committed:step=3"}
    check(run(3, kind, faults, joiners=1, late=2), reference(), dead=[0], joined=[3])
    entries = read(tmp_path / "record")
    assert audit(entries) == []
    steps = kept(entries)
    assert sorted(steps) == list(range(1, 8))
    assert [steps[n].loss for n in sorted(steps)] == [loss for _, loss, *_ in reference().steps]


def test_a_record_that_cannot_be_written_ends_nobody(tmp_path: Path) -> None:
    """Else each member that takes the record over would end, too."""
    kind = replace(KIND, record=str(tmp_path / "record"))
    check(run(2, kind, trick="disk full"), reference())


def test_a_step_that_is_left_out_does_not_disturb_a_save(tmp_path: Path) -> None:
    """No optimizer makes a step then, and the model is written all the same."""
    options = {"loss_scale": "dynamic", "clip_grad_norm": None}  # infinite in the first steps
    kind = Kind(dtype=torch.float16, optimizer="SGD", options=options, micro_batches=2)
    kind = replace(kind, steps=8, folder=str(tmp_path), every=1)
    check(run(2, kind), alone(replace(kind, folder=None)))


@pytest.mark.parametrize("leave", [{0: 2, 1: 2}, {0: 3, 1: 3, 2: 3}])
def test_members_that_are_told_leave_after_a_step(tmp_path: Path, leave: dict[int, int]) -> None:
    """Two of three at once, with one shadow: what they hold is handed over. All: saved."""
    kind = replace(KIND, folder=str(tmp_path), leave=leave)
    results = run(3, kind)
    for me, result in results.items():
        assert result.error is None
        done = len(result.value.steps)
        assert done == (leave[me] + 1 if me in leave else KIND.steps), me
        assert result.value.steps == reference().steps[:done]
    if len(leave) < 3:
        assert results[2].value.bits == reference().bits
    else:
        check(run(2, replace(kind, leave={})), reference(), joined=[0, 1])


@pytest.mark.parametrize("trick", ["slow to hear", "slow to hear, not told"])
def test_one_that_leaves_is_not_overtaken_by_another(trick: str) -> None:
    """Who goes at once ends what the other one hears by; where nobody waits that is noticed."""
    results = run(3, replace(KIND, leave={0: 2, 1: 2}), trick=trick)
    done = [len(results[me].value.steps) for me in range(3)]
    assert (done[0], done[2]) == (3, KIND.steps)
    assert (done[1] == 3) is (trick == "slow to hear")
    assert results[2].value.bits == reference().bits


@pytest.mark.parametrize("way", ["storage", "parity"])
def test_members_leave_by_another_way_where_handing_over_takes_too_long(
    tmp_path: Path, way: str
) -> None:
    """Nobody has all blocks then, so that who stays restores them, at that very step."""
    kind = replace(KIND, folder=str(tmp_path / "ckpt"), every=100, leave={0: 2, 1: 2})
    kind = replace(kind, memory=way == "parity")
    with runtime_folder(tmp_path / "runtime"):
        results = run(3, kind, trick=f"only {way}")
    assert [result.error for result in results.values()] == [None] * 3
    outcome = results[2].value
    assert outcome.bits == reference().bits
    assert [number for number, _ in outcome.attempts] == list(range(7)), "no step is done again"


def test_a_grace_that_is_too_short(tmp_path: Path) -> None:
    """They go at once; who stays goes back to what was saved, or ends where nothing was."""
    kind = replace(KIND, folder=str(tmp_path), leave={0: 3, 1: 3}, grace_s=0.0, wait_for={3: 2})
    results = run(3, kind)
    assert [result.error for result in results.values()] == [None] * 3
    outcome = results[2].value
    assert outcome.parameters == reference().parameters
    assert [number for number, _ in outcome.attempts][4] in (2, 4)
    results = run(3, replace(kind, folder=None, wait_for={}))
    if len(results[0].value.steps) == len(results[1].value.steps) == 4:
        assert isinstance(results[2].error, StateError)
    else:  # one went first, and the other regrouped before it did
        assert results[2].value.parameters == reference().parameters
