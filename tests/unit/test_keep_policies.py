"""What is kept: each policy, their composition, and that nothing a restore needs ever goes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import data_files, flip, load_once, must_notice
from hypothesis import given
from hypothesis import strategies as st
from save_cases import start

from planaria.checkpoint import Checkpointer, KeepBest, KeepEvery, KeepLast, open_checkpoint
from planaria.checkpoint.policies import KeepAny, KeepPolicy
from planaria.checkpoint.policies.keeping import kept
from planaria.checkpoint.retention import Retention, looks_whole
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.errors import ConfigError

STEPS = st.lists(st.integers(0, 200), unique=True, max_size=20).map(sorted)
VALUES = st.floats() | st.integers(-5, 5) | st.none() | st.just("text") | st.booleans()
POLICIES = st.one_of(
    st.builds(KeepLast, st.integers(1, 5)),
    st.builds(KeepEvery, st.integers(1, 50)),
    st.builds(
        KeepBest,
        st.sampled_from(["loss", "accuracy"]),
        st.integers(1, 4),
        st.sampled_from(["min", "max"]),
    ),
)


def chosen(
    policy: KeepPolicy, steps: Sequence[int], metrics: Mapping[int, Mapping[str, Any]]
) -> set[int]:
    return kept(policy, steps, metrics.get)


@given(STEPS, st.lists(POLICIES, min_size=1, max_size=4), st.data())
def test_a_union_keeps_what_any_would(steps, policies, data) -> None:
    metrics = {
        s: data.draw(st.dictionaries(st.sampled_from(["loss", "accuracy"]), VALUES)) for s in steps
    }
    union = KeepAny(*policies)
    whole = chosen(union, steps, metrics)
    assert whole == {s for p in policies for s in chosen(p, steps, metrics)}
    assert whole <= set(steps)
    joined: Any = policies[0]
    for policy in policies[1:]:
        joined = joined | policy
    assert chosen(joined, steps, metrics) == whole
    # Nothing is known without metrics: then nothing that they would decide goes.
    assert whole <= union.keep(steps)


@given(STEPS, st.integers(1, 5), st.sampled_from(["min", "max"]), st.data())
def test_the_best_are_the_best(steps, count, mode, data) -> None:
    metrics = {s: {"loss": data.draw(st.floats() | st.none())} for s in steps}
    best = chosen(KeepBest("loss", count, mode), steps, metrics)
    values = {s: v for s in steps if (v := metrics[s]["loss"]) is not None and not math.isnan(v)}
    if not values:
        assert best == set(steps)
        return
    assert len(best) == min(count, len(values))
    sign = 1 if mode == "min" else -1
    rest = set(values) - best
    assert all((sign * values[b], -b) < (sign * values[r], -r) for b in best for r in rest)


def test_policies_compare_and_show() -> None:
    union = KeepLast(2) | KeepEvery(10) | KeepBest("loss")
    assert union == KeepAny(KeepLast(2), KeepEvery(10), KeepBest("loss"))
    assert repr(union).startswith("KeepLast(count=2) | KeepEvery(steps=10) | KeepBest(")
    with pytest.raises(TypeError):
        KeepLast(2) | 3  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepEvery(0),
        lambda: KeepEvery(1.5),  # type: ignore[arg-type]
        lambda: KeepBest(""),
        lambda: KeepBest("loss", 0),
        lambda: KeepBest("loss", True),
        lambda: KeepBest("loss", mode="best"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


# In a run

LOSSES = [5.0, 1.0, 4.0, math.nan, 2.0, 3.0, 2.5, 6.0]


def saved(path: Path, keep: Any, losses: Sequence[Any] = LOSSES) -> list[int]:
    """Saves a step for each loss; returns what is left."""
    with Checkpointer(path, start(), every=1, keep=keep, audit=True) as ckpt:
        for step, loss in enumerate(losses, start=1):
            handle = ckpt.step(step, {} if loss is None else {"loss": loss})
            assert handle is not None
    return ckpt.all_steps()


def test_the_best_by_the_manifests(tmp_path) -> None:
    assert saved(tmp_path, KeepBest("loss", 2) | KeepLast(2)) == [2, 5, 7, 8]
    # The next run of the same folder reads them from there.
    with Checkpointer(tmp_path, start(), keep=KeepBest("loss", 2), audit=True) as ckpt:
        ckpt.restore()
        ckpt.save(9, {"loss": 1.5})
    assert ckpt.all_steps() == [2, 9]


def test_steps_without_the_metric_are_not_among_the_best(tmp_path) -> None:
    assert saved(tmp_path, KeepBest("loss"), [3.0, None, 2.0, None, None]) == [3, 5]


def test_a_misspelt_metric_costs_nothing(tmp_path) -> None:
    assert saved(tmp_path, KeepBest("lost")) == list(range(1, 9))


def test_a_step_that_is_saved_again_has_its_new_metrics(tmp_path) -> None:
    with Checkpointer(tmp_path, start(), keep=KeepBest("loss"), audit=True) as ckpt:
        for step, loss in ((1, 1.0), (2, 2.0), (1, 9.0), (3, 3.0)):
            ckpt.save(step, {"loss": loss}).wait_committed()
    assert ckpt.all_steps() == [2, 3]


@given(steps=STEPS, policy=POLICIES, bad=st.sets(st.integers(0, 200)), data=st.data())
def test_the_newest_that_verifies_never_goes(steps, policy, bad, data) -> None:
    check_never_loses(steps, policy, bad | set(data.draw(st.sets(st.sampled_from(steps or [0])))))


class Listed(Root):
    """A root that only has a list of steps."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def steps(self) -> list[int]:
        return list(self._steps)


def check_never_loses(steps: list[int], policy: KeepPolicy, bad: set[int]) -> None:
    retention = Retention(Listed(steps), policy, lambda s: s not in bad)
    retention.metrics = {s: {"loss": s % 7} for s in steps}.get  # type: ignore[method-assign]
    left = set(steps) - set(retention.removable())
    assert left <= set(steps)
    good = [s for s in steps if s not in bad]
    assert not good or good[-1] in left, "the newest that verifies is gone"
    assert not steps or steps[-1] in left, "the newest is gone"
    if not good:
        assert left == set(steps), "none can be restored: nothing may go"


def damage(path: Path, step: int, how: str) -> None:
    (data,) = data_files(path, step)
    manifest = data.with_name("manifest.json")
    if how == "manifest":
        flip(manifest, 100)
    elif how == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.unlink()


def check_damage(tmp_path: Path, how: str) -> None:
    """A run that keeps one step finds that its newest cannot be read."""
    assert saved(tmp_path, None, [1.0, 2.0, 3.0]) == [1, 2, 3]
    damage(tmp_path, 3, how)
    retention = Retention(Root(LocalStorage(tmp_path)), KeepLast(1))
    assert retention.removable() == [1]
    for step in retention.removable():
        Root(LocalStorage(tmp_path)).remove(step)
    with pytest.warns(UserWarning, match="step 3 cannot be restored"):
        assert load_once(tmp_path, start(5)).step == 2


@pytest.mark.parametrize("how", ["manifest", "cut", "gone"])
def test_what_a_restore_falls_back_to_stays(tmp_path, how) -> None:
    check_damage(tmp_path, how)
    assert open_checkpoint(tmp_path, 2).verify() == []


def test_what_looks_whole(tmp_path) -> None:
    saved(tmp_path, None, [1.0, 2.0])
    root = Root(LocalStorage(tmp_path))
    assert [looks_whole(root, s) for s in (1, 2, 3)] == [True, True, False]
    damage(tmp_path, 2, "cut")
    assert not looks_whole(root, 2)


def test_sabotage_retention_that_trusts_the_newest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Retention, "newest_good", lambda self, steps, *_: max(steps, default=None))
    must_notice(check_never_loses, [1, 2, 3], KeepLast(1), {3})
    must_notice(check_damage, tmp_path, "cut")
