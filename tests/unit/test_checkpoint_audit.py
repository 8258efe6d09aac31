"""Writes behind the gate's back: always noticed with audit=True, as often as promised without."""

import ctypes
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bits, contents, held, load_once, must_notice, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.capture import audit, gate
from planaria.checkpoint.capture.audit import SAMPLE_WINDOWS, WINDOW_NBYTES, Audit
from planaria.checkpoint.capture.sources import Source, Sources
from planaria.checkpoint.state.entries import Collector
from planaria.errors import SaveFailedError, TornCaptureError

State = dict[str, Any]


def start() -> State:
    model = randomise(nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50)), 1)
    state = {"model": model, "optim": optim.AdamW(model.parameters(), lr=0.1)}
    model(torch.randn(4, 40)).square().sum().backward()
    state["optim"].step()
    return state


def weight(state: State) -> torch.Tensor:
    return state["model"][0].weight


def write_raw(tensor: torch.Tensor, at: int) -> None:
    """One byte, as a kernel or another language would."""
    place = tensor.data_ptr() + at
    ctypes.memset(place, ctypes.string_at(place, 1)[0] ^ 1, 1)


def fused_step(state: State) -> None:
    """The kernel of fused AdamW, without the optimizer and hence without its hooks."""
    slots = state["optim"].state[weight(state)]
    with torch.no_grad():
        torch._fused_adamw_(
            [weight(state).detach()],
            [torch.ones_like(weight(state))],
            [slots["exp_avg"]],
            [slots["exp_avg_sq"]],
            [],
            [slots["step"]],
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def no_grad_step(state: State) -> None:
    with torch.no_grad():
        weight(state).sub_(0.1)


WRITES: dict[str, tuple[Callable[[State], object], str]] = {
    "in_place": (no_grad_step, "model.0.weight"),
    "data": (lambda s: weight(s).data.mul_(0.5), "model.0.weight"),
    "detached": (lambda s: weight(s).detach().numpy().__setitem__((0, 0), 9.0), "model.0.weight"),
    "first_byte": (lambda s: write_raw(weight(s), 0), "model.0.weight"),
    "last_byte": (lambda s: write_raw(weight(s), 40 * 50 * 4 - 1), "model.0.weight"),
    "bias": (lambda s: s["model"][1].bias.data.add_(1), "model.1.bias"),
    "fused": (fused_step, "model.0.weight"),
    "slot": (
        lambda s: s["optim"].state[weight(s)]["exp_avg"].data.zero_(),
        "optim.0.weight.exp_avg",
    ),
    "step_counter": (
        lambda s: write_raw(s["optim"].state[weight(s)]["step"], 3),
        "optim.0.weight.step",
    ),
    "foreach": (
        lambda s: torch._foreach_add_([weight(s).data], 1.0),
        "model.0.weight",
    ),
}


def check_a_write_is_noticed(path: Path, write: Callable[[State], object], name: str) -> None:
    """The save fails, names the tensor, and commits nothing."""
    state = start()
    with Checkpointer(path, state, audit=True, on_failure="fatal") as ckpt:
        with held("checkpoint.capture.begin") as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            write(state)
            hold.go_on.set()
            with pytest.raises(SaveFailedError, match=name) as caught:
                handle.wait_committed()
        assert isinstance(caught.value.__cause__, TornCaptureError)
        assert "before_update" in str(caught.value)
        with pytest.raises(SaveFailedError):
            ckpt.step(2)
        assert ckpt.all_steps() == []
        ckpt.save(3).wait_committed()


@pytest.mark.parametrize("name", WRITES)
def test_a_write_behind_the_gate_is_always_noticed(name, tmp_path):
    check_a_write_is_noticed(tmp_path, *WRITES[name])


def test_a_write_between_two_chunks_is_noticed(tmp_path):
    state = {"model": nn.Linear(1100, 2000, bias=False)}  # three chunks
    with Checkpointer(tmp_path, state, audit=True, on_failure="degrade") as ckpt:
        for at in (0, 1100 * 2000 * 4 - 1):
            with warnings.catch_warnings(), held("checkpoint.write.chunk") as hold:
                warnings.simplefilter("ignore")
                handle = ckpt.save(1)
                hold.wait_reached()
                write_raw(state["model"].weight, at)
                hold.go_on.set()
                handle._done.wait(60)
            # Noticed, unless the capture was through by then: never torn in either case.
            assert handle.committed or "model.weight changed" in str(handle.error)


def check_a_swap_is_noticed(path: Path) -> None:
    """Weights swapped for others and back, all while the capture runs."""
    state = start()
    own, other = weight(state).detach().clone(), torch.zeros(50, 40)
    with (
        Checkpointer(path, state, audit=True, on_failure="degrade") as ckpt,
        warnings.catch_warnings(),
        held("checkpoint.capture.begin") as before,
        held("checkpoint.capture.audit") as after,
    ):
        warnings.simplefilter("ignore")
        handle = ckpt.save(1)
        before.wait_reached()
        weight(state).data.copy_(other)
        before.go_on.set()
        after.wait_reached()
        weight(state).data.copy_(own)
        after.go_on.set()
        handle._done.wait(60)
        assert "model.0.weight changed" in str(handle.error)


def test_a_write_that_is_undone_in_time_is_noticed(tmp_path):
    check_a_swap_is_noticed(tmp_path)


def test_what_is_captured_is_compared_however_it_is_cut(monkeypatch):
    """Windows and chunks have different edges; a slab may begin inside a window."""
    monkeypatch.setattr(audit, "_AUDIT_NBYTES", 4096)
    tensor = torch.arange(5000, dtype=torch.int32)
    raw = memoryview(bits(tensor))
    for slab in (0, 4096, 6000):
        for cut in (256, 4096, 9000, 20000):
            for wrong in (None, slab, len(raw) - 1, 9999):
                found = Audit(Sources({"t": Source(tensor)}), everything=True, rng=random.Random(0))
                data = bytearray(raw)
                if wrong is not None:
                    data[wrong] ^= 1
                for start in range(slab, len(raw), cut):
                    found.captured("t", start, memoryview(data)[start : start + cut])
                whole_from = -(-slab // 4096) * 4096
                if wrong is None or wrong < whole_from:
                    found.check()
                else:
                    with pytest.raises(TornCaptureError, match=r"^t changed"):
                        found.check()


def test_parts_that_other_ranks_capture_are_not_missed():
    tensor = torch.arange(4096, dtype=torch.int32)  # one window of 16 KiB
    raw = memoryview(bits(tensor))
    found = Audit(Sources({"t": Source(tensor)}), everything=True, rng=random.Random(0))
    for start, stop in ((0, 4096), (8192, 12288), (12288, 16384)):
        found.captured("t", start, raw[start:stop])
    found.check()


def test_before_update_is_the_way_to_write(tmp_path):
    state = start()
    expected = {k: contents(v) for k, v in state.items()}
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        handle = ckpt.save(1)
        ckpt.before_update()
        weight(state).data.zero_()
        handle.wait_committed()
    load_once(tmp_path, state)
    assert {k: contents(v) for k, v in state.items()} == expected


def test_replacing_the_data_of_a_parameter_is_no_write(tmp_path):
    state = start()
    expected = bits(weight(state))
    with (
        Checkpointer(tmp_path, state, audit=True) as ckpt,
        held("checkpoint.capture.begin") as hold,
    ):
        handle = ckpt.save(1)
        hold.wait_reached()
        weight(state).data = torch.zeros(50, 40)
        hold.go_on.set()
        handle.wait_committed()
    load_once(tmp_path, state)
    assert bits(weight(state)) == expected


def test_eager_parts_may_change_at_once(tmp_path):
    """Buffers are copied at the call: a forward may change them while the rest is captured."""
    check_buffers_may_change_at_once(tmp_path)


def check_buffers_may_change_at_once(path: Path) -> None:
    state = start()
    expected = contents(state["model"])
    with Checkpointer(path, state, audit=True, on_failure="fatal") as ckpt:
        with held("checkpoint.capture.begin") as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            state["model"](torch.randn(4, 40))
            state["model"][1].running_mean.data.zero_()
            hold.go_on.set()
        handle._done.wait(60)
        ckpt._failures.take()
        assert handle.committed, handle.error
    load_once(path, state)
    assert contents(state["model"]) == expected


# The default's sample


def noticed(sources: dict[str, torch.Tensor], write: Callable[[], object], seed: int) -> bool:
    found = Audit(
        Sources({name: Source(tensor) for name, tensor in sources.items()}),
        everything=False,
        rng=random.Random(seed),
    )
    write()
    try:
        found.check()
    except TornCaptureError:
        return True
    return False


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_the_sample_notices_as_often_as_promised(share):
    windows, trials = 500, 300
    memory = torch.zeros(windows * WINDOW_NBYTES, dtype=torch.uint8)
    sources = dict(enumerate(memory.split([*[WINDOW_NBYTES * 50] * 9, WINDOW_NBYTES * 50])))
    sources = {f"t{i}": t for i, t in sources.items()}
    raw, rng = memory.numpy(), random.Random(1)

    def write() -> None:
        for window in rng.sample(range(windows), round(share * windows)):
            raw[window * WINDOW_NBYTES + rng.randrange(WINDOW_NBYTES)] += 1

    hits = sum(noticed(sources, write, seed) for seed in range(trials))
    expected = 1 - (1 - share) ** SAMPLE_WINDOWS
    spread = (expected * (1 - expected) / trials) ** 0.5
    assert abs(hits / trials - expected) <= 4 * spread + 1 / trials


def test_a_write_of_everything_is_always_noticed_by_the_sample():
    tensors = {f"t{i}": torch.randn(i + 1, 3).t() for i in range(40)}

    def write() -> None:
        for tensor in tensors.values():
            tensor.numpy()[...] += 1

    assert all(noticed(tensors, write, seed) for seed in range(20))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3000), max_size=5), st.booleans(), st.data())
def test_nothing_is_noticed_where_nothing_changed_and_any_byte_with_audit(sizes, transposed, data):
    tensors = {
        f"t{i}": torch.zeros(n, 2).t() if transposed else torch.zeros(n)
        for i, n in enumerate(sizes)
    }
    sources = {name: Source(t) for name, t in tensors.items()}
    for everything in (False, True):
        Audit(Sources(sources), everything=everything, rng=random.Random(0)).check()
    filled = [name for name, t in tensors.items() if t.numel()]
    if filled:
        found = Audit(Sources(sources), everything=True, rng=random.Random(0))
        name = data.draw(st.sampled_from(filled))
        write_raw(tensors[name], data.draw(st.integers(0, tensors[name].numel() * 4 - 1)))
        with pytest.raises(TornCaptureError, match=f"^{name} changed"):
            found.check()


# Sabotage: each of these must be noticed by the checks above.


@pytest.mark.parametrize("name", ["data", "fused", "last_byte"])
def test_sabotage_no_second_look(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Audit, "check", lambda _: None)
    must_notice(check_a_write_is_noticed, tmp_path, *WRITES[name])


def test_sabotage_no_look_at_what_was_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(Audit, "captured", lambda *_: None)
    must_notice(check_a_swap_is_noticed, tmp_path)


def test_sabotage_versions_alone_miss_what_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_all", lambda _: [])
    must_notice(check_a_write_is_noticed, tmp_path / "data", *WRITES["data"])
    check_a_write_is_noticed(tmp_path / "in_place", *WRITES["in_place"])


def test_sabotage_buffers_copied_late(tmp_path, monkeypatch):
    add = Collector.tensor

    def add_lazily(self: Collector, name: str, tensor: torch.Tensor, **options: Any) -> None:
        add(self, name, tensor, **{**options, "lazy": True})

    monkeypatch.setattr(Collector, "tensor", add_lazily)
    must_notice(check_buffers_may_change_at_once, tmp_path)


def test_sabotage_without_the_gate_the_audit_still_keeps_torn_state_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "close_gate_for", lambda _: None)

    def step(state: State) -> None:
        state["optim"].step()

    check_a_write_is_noticed(tmp_path, step, "model.0.weight")
