"""A state that is laid out as it was is recognised; whatever else has changed is noticed."""

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bits, held, must_notice, randomise
from torch import nn, optim

from planaria.checkpoint import Checkpointer, checkpointer, open_checkpoint
from planaria.checkpoint.capture import loops
from planaria.checkpoint.capture.file_sources import FileSources
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.layout.own_plan import OwnPlan
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state import recall
from planaria.checkpoint.state.early import ALL_SMALL_NBYTES, EarlyCopies, small
from planaria.checkpoint.state.entries import Collector, TensorEntry
from planaria.checkpoint.state.objects import settled
from planaria.checkpoint.state.optim import OptimizerProvider
from planaria.checkpoint.state.recall import Recalled, StateLayout, Structure
from planaria.checkpoint.state.stateset import StateSet
from planaria.errors import SaveFailedError

State = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.small = nn.Parameter(torch.randn(6).bfloat16())
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.here: nn.Module | None = nn.PReLU()
        self.there: nn.Module | None = None


def start(stepped: bool = True) -> State:
    model = randomise(Net(), 1)
    state = {"model": model, "optim": optim.AdamW(model.parameters(), lr=0.1)}
    if stepped:
        step(state)
    return state


def step(state: State) -> None:
    for p in state["model"].parameters():
        p.grad = torch.ones_like(p)
    state["optim"].step()


def swap_children(state: State) -> None:
    children = state["model"].__dict__["_modules"]
    children["here"], children["there"] = None, children["here"]


def tie(state: State) -> None:
    state["model"].head.weight = state["model"].first.weight = nn.Parameter(torch.randn(6, 6))


def other_address(state: State) -> None:
    state["model"].first.weight.data = torch.randn(6, 4)


def at(state: State, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    p = state["model"].head.weight
    p.data = p.data.as_strided(shape, strides)


def other_dtype(state: State) -> None:
    p = state["model"].small
    p.data = p.data.view(torch.float16)


def more_slots(state: State) -> None:
    slots = state["optim"].state[state["model"].first.weight]
    slots["max_exp_avg_sq"] = torch.ones(6, 4)


def renamed_slot(state: State) -> None:
    slots = state["optim"].state[state["model"].first.weight]
    slots["average"] = slots.pop("exp_avg")


def counted_slot(state: State) -> None:
    state["optim"].state[state["model"].first.weight]["step"] = 7


def more_groups(state: State) -> None:
    extra = nn.Parameter(torch.ones(2))
    state["model"].extra = extra
    state["optim"].add_param_group({"params": [extra]})


def other_order(state: State) -> None:
    groups = state["optim"].param_groups
    groups[0]["params"].reverse()


def extra_state(state: State) -> None:
    class Knows(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(3)

        def set_extra_state(self, state: Any) -> None:
            pass

    state["model"].head.__class__ = Knows


def no_longer_kept(state: State) -> None:
    state["model"].norm._non_persistent_buffers_set.add("running_mean")


CHANGES: dict[str, Callable[[State], object]] = {
    "nothing but values": step,
    "settings": lambda s: s["optim"].param_groups[0].update(lr=0.5),
    "new memory": other_address,
    "another shape": lambda s: at(s, (4, 9), (9, 1)),
    "other strides": lambda s: at(s, (6, 6), (1, 6)),
    "another dtype": other_dtype,
    "conjugated": lambda s: setattr(s["model"].wave, "data", s["model"].wave.data.conj()),
    "negated": lambda s: setattr(
        s["model"].first.bias, "data", torch._neg_view(s["model"].first.bias.data)
    ),
    "frozen": lambda s: s["model"].first.requires_grad_(False),
    "another parameter": lambda s: setattr(s["model"].first, "bias", nn.Parameter(torch.ones(6))),
    "one less": lambda s: setattr(s["model"].first, "bias", None),
    "one more": lambda s: s["model"].register_parameter("more", nn.Parameter(torch.ones(3))),
    "another module": lambda s: setattr(s["model"], "head", nn.Linear(6, 2)),
    "a module less": lambda s: setattr(s["model"], "norm", None),
    "a name": lambda s: setattr(s["model"], "tail", s["model"].__dict__["_modules"].pop("head")),
    "another child is none": swap_children,
    "tied": tie,
    "a buffer's tensor": lambda s: setattr(s["model"].norm, "running_mean", torch.ones(6)),
    "a buffer is not kept": no_longer_kept,
    "written in forward": lambda s: setattr(s["model"].words, "max_norm", 1.0),
    "extra state": extra_state,
    "more slots": more_slots,
    "a renamed slot": renamed_slot,
    "a slot that is no tensor": counted_slot,
    "a slot's tensor": lambda s: (
        s["optim"].state[s["model"].wave].update(exp_avg=torch.ones(4, dtype=torch.complex64))
    ),
    "slots gone": lambda s: s["optim"].state.clear(),
    "slots loaded": lambda s: s["optim"].load_state_dict(s["optim"].state_dict()),
    "another group": more_groups,
    "another order": other_order,
}
#: What leaves every tensor where it was.
KEPT = {"nothing but values", "settings", "frozen", "slots loaded"}


def contents(entry: TensorEntry) -> tuple[Any, ...]:
    what = (entry.shape, entry.box, entry.dtype, entry.lazy, entry.pinned_writer, entry.alias_of)
    data = entry.local.resolve_conj().resolve_neg()
    # What is copied at the call may be made for it.
    place = (entry.source.address, entry.local.data_ptr()) if entry.lazy else ()
    return (*what, bits(data), *place)


def check_change(change: Callable[[State], object]) -> bool:
    """What is collected after a change is what one collects who sees the state first."""
    state = start()
    known = StateSet(state)
    known.collect()
    assert isinstance(known.collect().tensors, Recalled)
    change(state)
    found, fresh = known.collect(), StateSet(state).collect()
    assert list(found.tensors) == list(fresh.tensors)
    for name in fresh.tensors:
        assert contents(found.tensors[name]) == contents(fresh.tensors[name]), name
    assert settled(found.objects) == settled(fresh.objects)
    return isinstance(found.tensors, Recalled)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name: str) -> None:
    assert check_change(CHANGES[name]) == (name in KEPT)


@pytest.mark.parametrize("name", CHANGES)
def test_so_it_is_where_torch_has_no_guards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_guards", lambda _: None)
    assert check_change(CHANGES[name]) == (name in KEPT)


def test_a_first_step_makes_slots(tmp_path: Path) -> None:
    state = start(stepped=False)
    with Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait_committed()
        step(state)
        ckpt.save(2).wait_committed()
        step(state)
        expected = bits(state["optim"].state[state["model"].first.weight]["exp_avg"])
        ckpt.save(3).wait_committed()
    assert "optim.first.weight.exp_avg" not in open_checkpoint(tmp_path, 1).names()
    assert bits(open_checkpoint(tmp_path).read("optim.first.weight.exp_avg")) == expected


def test_what_is_gone_is_not_taken_for_none() -> None:
    model = nn.Linear(2, 2)
    known = StateSet({"model": model})
    known.collect()
    setattr(model, "bias", None)  # noqa: B010 - it is declared as a parameter
    gc.collect()
    assert list(known.collect().tensors) == ["model.weight"]


def test_it_keeps_no_memory_alive(tmp_path: Path) -> None:
    """Neither a parameter that was replaced, nor the memory that it showed before."""
    model = randomise(Net(), 1)
    with Checkpointer(tmp_path, {"model": model}) as ckpt:
        for n in (1, 2, 3):
            ckpt.save(n).wait_committed()
        shown = torch.UntypedStorage._weak_ref(model.head.weight.untyped_storage())
        replaced = weakref.ref(model.first.weight)
        model.first.weight = nn.Parameter(torch.ones(6, 4))
        model.head.weight.data = torch.ones(6, 6)
        gc.collect()
        assert replaced() is None
        assert torch.UntypedStorage._expired(shown)
        torch.UntypedStorage._free_weak_ref(shown)


def check_replaced_memory(root: Path) -> None:
    """The memory at the call is what is saved, whatever a parameter shows later."""
    state = start()
    with (
        Checkpointer(root, state, on_failure="fatal", audit=True) as ckpt,
        held("checkpoint.capture.begin") as hold,
    ):
        hold.go_on.set()
        ckpt.save(1).wait_committed()
        assert isinstance(ckpt._job.options.state.collect().tensors, Recalled)
        hold.go_on.clear()
        expected = bits(state["model"].first.weight)
        handle = ckpt.save(2)
        state["model"].first.weight.data = torch.zeros(6, 4)
        state["model"].turned.data = torch.zeros(5, 3)
        hold.go_on.set()
        handle.wait_committed()
    assert bits(open_checkpoint(root).read("model.first.weight")) == expected


def test_memory_that_is_replaced_after_the_call(tmp_path: Path) -> None:
    check_replaced_memory(tmp_path)


def test_memory_that_is_freed_after_the_call_is_not_read(tmp_path: Path) -> None:
    state = start()
    with Checkpointer(tmp_path, state, on_failure="fatal", audit=True) as ckpt:
        ckpt.save(1).wait_committed()
        with held("checkpoint.capture.begin") as hold:
            handle = ckpt.save(2)
            hold.wait_reached()
            state["model"].first.weight.untyped_storage().resize_(0)
            hold.go_on.set()
            with pytest.raises(SaveFailedError, match=r"memory of model\.first\.weight was freed"):
                handle.wait_committed()
        with pytest.raises(SaveFailedError):
            ckpt.close()


def check_small_tensors_are_copied_at_the_call(root: Path) -> None:
    """What becomes of them later is nobody's concern, be it freed; each save has its own copy."""
    state = start()
    weight = state["model"].first.weight
    small = {
        "model.first.weight": weight,
        "model.small": state["model"].small,
        "model.wave": state["model"].wave,
        "model.norm.running_mean": state["model"].norm.running_mean,
        "optim.first.weight.step": state["optim"].state[weight]["step"],
        "optim.first.weight.exp_avg": state["optim"].state[weight]["exp_avg"],
    }
    expected: dict[int, dict[str, bytes]] = {}
    with (
        Checkpointer(root, state, on_failure="fatal") as ckpt,
        held("checkpoint.capture.begin") as hold,
    ):
        hold.go_on.set()
        ckpt.save(1).wait_committed()
        hold.go_on.clear()
        handles = []
        for n in (2, 3, 4):
            expected[n] = {name: bits(tensor) for name, tensor in small.items()}
            handles.append(ckpt.save(n))
            for tensor in small.values():  # behind the gate's back
                tensor.detach().view(torch.uint8 if tensor.dim() else torch.int32).add_(n)
        weight.untyped_storage().resize_(0)
        hold.go_on.set()
        for handle in handles:
            handle.wait_committed()
    for n, values in expected.items():
        stored = open_checkpoint(root, n)
        assert {name: bits(stored.read(name)) for name in values} == values, n


def test_small_tensors_are_copied_at_the_call(tmp_path: Path) -> None:
    check_small_tensors_are_copied_at_the_call(tmp_path)


def test_large_tensors_are_not_copied_at_the_call(tmp_path: Path) -> None:
    """Nor more than some of the small ones: a call must stay short."""
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(512)) for i in range(9)})
    model["large"] = nn.Parameter(torch.ones(513))
    state = StateSet({"model": model})
    state.collect()
    found = state.collect().tensors
    assert isinstance(found, Recalled)
    assert list(found.names) == ["model.large"]
    layout, known = found.layout, list(found.layout.known)
    assert len(small(range(9), known)) == 9
    assert len(layout.early.places) == 9
    many = known * 1000
    assert sum(many[row].nbytes for row in small(range(len(many)), many)) == ALL_SMALL_NBYTES


def test_a_room_is_used_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"model": randomise(Net(), 1)}) as ckpt:
        rooms = set[int]()
        for n in (1, 2, 3):
            ckpt.save(n).wait_committed()
            found = ckpt._job.options.state.collect().tensors
            assert isinstance(found, Recalled)
            rooms |= {room.data_ptr() for room in found.layout.early._rooms}
    assert len(rooms) == 1


def check_plans_are_told_once(path: Path, sabotage: bool = False) -> None:
    """One collective a save before the capture; plans are told, and made, where they are new."""
    state = start(stepped=False)
    with Checkpointer(path, state) as ckpt:
        agree = ckpt._job.attached.pipeline._agree
        meet, met, made = agree._meet, Counter[int](), []

        def counted(job: SaveJob, collective: Any, value: Any) -> Any:
            met[job.step] += 1
            return meet(job, collective, value)

        agree._meet = counted
        for n in range(1, 6):
            if sabotage:
                agree._plans = None
            ckpt.save(n).wait_committed()
            made.append(agree._plans)
            if n == 2:
                step(state)  # makes slots, so the layout is another one
    assert met == {1: 2, 2: 1, 3: 2, 4: 1, 5: 1}
    assert made[0] is made[1] is not made[2]
    assert made[2] is made[3] is made[4]


def test_plans_are_told_and_made_only_where_the_layout_is_new(tmp_path: Path) -> None:
    check_plans_are_told_once(tmp_path)


def check_first_save_is_warm(path: Path) -> None:
    """The first save compiles nothing and touches no fresh memory, slots to come included."""
    state = start(stepped=False)
    with Checkpointer(path, state) as ckpt:
        pool = ckpt._job.attached.pool
        assert pool.nbytes, "the pool was not touched ahead"
        before = pool.nbytes, len(loops.copy_pieces.signatures)
        step(state)
        ckpt.save(1).wait_committed()
        assert (pool.nbytes, len(loops.copy_pieces.signatures)) == before


def test_kernels_and_pool_are_warm_from_the_start(tmp_path: Path) -> None:
    check_first_save_is_warm(tmp_path)


# Sabotage: each of these must be noticed by the checks above.


def test_sabotage_plans_are_told_in_each_save(tmp_path: Path) -> None:
    must_notice(check_plans_are_told_once, tmp_path, True)


def test_sabotage_nothing_is_warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BufferPool, "reserve", lambda self, nbytes: None)
    must_notice(check_first_save_is_warm, tmp_path / "pool")
    monkeypatch.undo()
    monkeypatch.setattr(loops, "copy_pieces", loops.compiled(loops.copy_pieces.py_func))
    monkeypatch.setattr(checkpointer, "warm", lambda: None)
    must_notice(check_first_save_is_warm, tmp_path / "kernels")


@pytest.mark.filterwarnings("ignore:step . was not committed")
def test_sabotage_small_tensors_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "small", lambda *_: set())
    with pytest.raises(SaveFailedError, match=r"changed while being captured|was freed or moved"):
        check_small_tensors_are_copied_at_the_call(tmp_path)


def test_sabotage_two_saves_share_a_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = EarlyCopies.take

    def shared(self: EarlyCopies) -> torch.Tensor:
        room = take(self)
        self.give_back(room)
        return room

    monkeypatch.setattr(EarlyCopies, "take", shared)
    must_notice(check_small_tensors_are_copied_at_the_call, tmp_path)


def test_sabotage_structure_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structure, "again", lambda self: self._seen()[1])
    for name in ("another parameter", "a name", "a buffer is not kept", "written in forward"):
        must_notice(check_change, CHANGES[name])


def test_sabotage_only_addresses_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateLayout, "_same_forms", lambda *_: True)
    for name in ("another shape", "other strides", "another dtype", "conjugated", "negated"):
        must_notice(check_change, CHANGES[name])


def test_sabotage_settings_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[str, Any] = {}
    recollect = OptimizerProvider.recollect

    def stale(self: OptimizerProvider, out: Collector) -> None:
        kept = first.setdefault(self.key, Collector())
        if not kept.objects:
            recollect(self, kept)
        out.objects.update(kept.objects)

    def check() -> None:
        first.clear()
        state = start()
        known = StateSet(state)
        known.collect()
        CHANGES["settings"](state)
        assert '"lr": 0.5' in json.dumps(known.collect().objects["optim.param_groups"])

    check()
    monkeypatch.setattr(OptimizerProvider, "recollect", stale)
    must_notice(check)


@pytest.mark.filterwarnings("ignore:step . was not committed")
def test_sabotage_what_a_tensor_shows_later_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: OwnPlan, live: Any) -> FileSources:
        if isinstance(live, Recalled):
            rows, entry = enumerate(live.layout.names), live.layout.entry
            live = {name: entry(row, live._tensors[row].detach(), None) for row, name in rows}
        return FileSources(self.entries, live)

    monkeypatch.setattr(OwnPlan, "sources", late)
    with pytest.raises((AssertionError, SaveFailedError)):
        check_replaced_memory(tmp_path)
