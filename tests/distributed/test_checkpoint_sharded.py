"""Sharded models: saved in one form, restored in any other, and going on as if never stopped."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from trainings import SAVED_AT, Job, Outcome, digest, restore_and_train, train_and_save

from planaria.checkpoint import open_checkpoint

ON_4 = [
    Job("ddp"),
    Job("ddp", optimizer="adafactor"),
    Job("fsdp:4"),
    Job("fsdp:4", optimizer="sgd"),
    Job("fsdp:4", optimizer="factored"),
    Job("fsdp:4", model="tied"),
    Job("fsdp:4", model="frozen"),
    Job("fsdp:4", policy="bf16"),
    Job("fsdp:4", policy="offload"),
    Job("fsdp:4", policy="recomputed"),
    Job("fsdp:4", policy="compiled"),
    Job("fsdp:4", evaluate=True),
    Job("hsdp:2x2"),
    Job("tp:4"),
    Job("fsdp_tp:2x2", optimizer="amsgrad"),
    Job("fsdp_tp:2x2", model="tied"),
    Job("fsdp_tp:1x4"),
    Job("fsdp_tp:4x1"),
]
#: Saved on 4 ranks, restored on 4 ranks in another form.
CROSSED = [
    (Job("ddp"), "fsdp:4"),
    (Job("ddp"), "tp:4"),
    (Job("fsdp:4"), "ddp"),
    (Job("fsdp:4"), "fsdp_tp:2x2"),
    (Job("fsdp:4", model="tied"), "fsdp_tp:2x2"),
    (Job("fsdp:4", model="frozen"), "hsdp:2x2"),
    (Job("hsdp:2x2"), "tp:4"),
    (Job("tp:4"), "fsdp_tp:2x2"),
    (Job("fsdp_tp:2x2", optimizer="amsgrad"), "fsdp:4"),
    (Job("fsdp_tp:1x4"), "fsdp_tp:2x2"),
    (Job("fsdp_tp:4x1"), "fsdp_tp:1x4"),
]
ON_1 = [Job("plain"), Job("plain", model="tied")]
FORMS_ON_4 = ["ddp", "fsdp:4", "hsdp:2x2", "fsdp_tp:2x2", "fsdp_tp:1x4"]

# Each of the runs below carries out dozens of jobs, one after the other.
TIMEOUT_S = 500
pytestmark = pytest.mark.timeout(600)

Saved = tuple[Path, dict[Job, list[Outcome]]]
Pair = tuple[Job, Job]
Restored = dict[Pair, list[Outcome]]

SAME: list[Pair] = [(job, job) for job in ON_4]
IN_ANOTHER_FORM: list[Pair] = [(job, replace(job, form=form)) for job, form in CROSSED]
FROM_1: list[Pair] = [(job, replace(job, form=form)) for job in ON_1 for form in FORMS_ON_4]


def _save(world: int, root: Path, jobs: list[Job]) -> Saved:
    of_ranks = run_ranks(world, train_and_save, root, jobs, timeout=TIMEOUT_S)
    return root, {job: [outcomes[job] for outcomes in of_ranks] for job in jobs}


def _restore(world: int, root: Path, pairs: list[Pair]) -> Restored:
    of_ranks = run_ranks(world, restore_and_train, root, pairs, timeout=TIMEOUT_S)
    return {pair: [outcomes[pair] for outcomes in of_ranks] for pair in pairs}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Every job of `ON_4` trained without a break on 4 ranks, and what it saved on the way."""
    return _save(4, tmp_path_factory.mktemp("saved"), ON_4)


@pytest.fixture(scope="module")
def saved_on_1(saved: Saved) -> Saved:
    """The jobs of `ON_1`, in the same folder."""
    return _save(1, saved[0], ON_1)


@pytest.fixture(scope="module")
def restored_on_4(saved: Saved, saved_on_1: Saved) -> Restored:
    """All that is restored on 4 ranks, by the same four: torch works each layout out once."""
    return _restore(4, saved[0], [*SAME, *IN_ANOTHER_FORM, *FROM_1])


def _check_equal(restored: Restored, saved: dict[Job, list[Outcome]]) -> None:
    for (source, job), outcomes in restored.items():
        for outcome in outcomes:
            assert outcome.state == saved[source][0].state, f"{source} restored as {job}"


def test_what_was_saved_is_the_state_of_that_step(saved: Saved) -> None:
    root, outcomes = saved
    for job, of_ranks in outcomes.items():
        checkpoint = open_checkpoint(root / job.folder)
        assert checkpoint.step == SAVED_AT
        assert checkpoint.verify() == []
        manifest = checkpoint.manifest
        written = sum(file.data_nbytes for file in manifest.files)
        assert written == sum(info.nbytes for info in manifest.tensors.values()), "once each"
        stored = {name: digest(checkpoint.read(name)) for name in checkpoint.names()}
        for outcome in of_ranks:
            # Counters of an optimizer's steps may stand among the objects.
            assert {k: v for k, v in outcome.state.items() if k in stored} == stored, job


def test_it_goes_on_as_if_it_had_never_stopped(saved: Saved, restored_on_4: Restored) -> None:
    _, outcomes = saved
    for job in ON_4:
        for mine, uninterrupted in zip(restored_on_4[job, job], outcomes[job], strict=True):
            assert mine.state == uninterrupted.state, job
            assert mine.losses == uninterrupted.losses, job
            assert mine.final == uninterrupted.final, job
            assert mine.skipped == {}, job


def test_in_another_form_on_as_many_ranks(saved: Saved, restored_on_4: Restored) -> None:
    _check_equal({pair: restored_on_4[pair] for pair in IN_ANOTHER_FORM}, saved[1])


def test_on_three_ranks(saved: Saved) -> None:
    root, outcomes = saved
    # Not one of the sizes is a multiple of 3.
    jobs = [job for job in ON_4 if job.optimizer != "adafactor" and not job.policy]
    restored = _restore(3, root, [(job, replace(job, form="fsdp:3")) for job in jobs])
    _check_equal(restored, outcomes)
    for of_ranks in restored.values():
        assert [list(o.skipped) for o in of_ranks] == [[], [], []]


def test_on_one_rank(saved: Saved) -> None:
    root, outcomes = saved
    restored = _restore(1, root, [(job, replace(job, form="plain", policy="")) for job in ON_4])
    _check_equal(restored, outcomes)
    # With the same data for all ranks only the order of sums differs.
    mine = restored[Job("tp:4"), Job("plain")][0]
    assert mine.losses == pytest.approx(outcomes[Job("tp:4")][0].losses, rel=1e-5)


def test_from_one_rank_to_four(saved_on_1: Saved, restored_on_4: Restored) -> None:
    restored = {pair: restored_on_4[pair] for pair in FROM_1}
    _check_equal(restored, saved_on_1[1])
    for (_, job), of_ranks in restored.items():
        # Rank 0's random numbers go on, the new ranks have none to go on from.
        assert [list(o.skipped) for o in of_ranks] == [[], ["rng"], ["rng"], ["rng"]], job


@pytest.mark.soak
def test_many_forms_to_many_forms(tmp_path: Path) -> None:
    forms = {1: ["plain"], 2: ["ddp", "fsdp:2", "tp:2", "fsdp_tp:2x1", "fsdp_tp:1x2"],
             3: ["ddp", "fsdp:3"], 4: FORMS_ON_4, 6: ["fsdp:6", "hsdp:2x3", "fsdp_tp:3x2"],
             8: ["fsdp:8", "fsdp_tp:2x4", "fsdp_tp:4x2", "hsdp:4x2"]}  # fmt: skip
    variants = [Job("", optimizer=o) for o in ("adamw", "sgd")]
    variants += [Job("", model="tied"), Job("", model="frozen")]
    chosen = random.Random(0)
    for world, of_world in forms.items():
        jobs = [replace(v, form=form) for v in variants for form in of_world]
        root, outcomes = _save(world, tmp_path / str(world), jobs)
        for target, targets in forms.items():
            pairs = [(job, replace(job, form=form)) for job in jobs for form in targets]
            pairs = chosen.sample(pairs, min(12, len(pairs)))
            _check_equal(_restore(target, root, pairs), outcomes)
