"""Modules and tensors of every kind: names, tied weights, odd memory, what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import bits, contents, data_files, load_once, must_notice, randomise, save_once
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.opening import CHUNK_NBYTES
from planaria.checkpoint.state import entries
from planaria.errors import MismatchError, StateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.scale = nn.Buffer(torch.ones(3))
        self.scratch = nn.Buffer(torch.ones(5), persistent=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.scale


PLAIN_NAMES = sorted(f"model.{n}" for n in Net().state_dict())


def names_of(path) -> list[str]:
    return open_checkpoint(path).names()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data_parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "compiled_and_checkpointed": lambda m: torch.compile(checkpoint_wrapper(m), backend="eager"),
}


def wrap_inside(model: Any) -> Any:
    model.body[0] = checkpoint_wrapper(model.body[0])
    model.body[2] = torch.compile(model.body[2], backend="eager")
    return model


@pytest.mark.parametrize("name", [*WRAPPERS, "inside"])
def test_names_never_carry_a_wrapper(name, tmp_path):
    """A wrapped model's checkpoint has the plain model's names and loads into it, and back."""
    wrap = WRAPPERS.get(name, wrap_inside)
    plain = randomise(Net(), 1)
    wrapped = wrap(copy.deepcopy(plain))
    save_once(tmp_path / "wrapped", {"model": wrapped})
    more = ["model.n_averaged"] if name == "averaged" else []
    assert names_of(tmp_path / "wrapped") == sorted(PLAIN_NAMES + more)

    target = randomise(Net(), 2)
    load_once(tmp_path / "wrapped", {"model": target}, strict=not more)
    assert contents(target) == contents(plain)

    save_once(tmp_path / "plain", {"model": plain})
    again = wrap(randomise(Net(), 3))
    load_once(tmp_path / "plain", {"model": again}, strict=not more)
    found = {n.replace("module.", ""): v for n, v in again.state_dict().items()}
    for mark in ("_orig_mod.", "_checkpoint_wrapped_module."):
        found = {n.replace(mark, ""): v for n, v in found.items()}
    for n, value in plain.state_dict().items():
        assert bits(found[n]) == bits(value)


def test_a_users_own_child_called_module_keeps_its_name(tmp_path):
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    save_once(tmp_path, {"model": model})
    assert names_of(tmp_path) == ["model.module.bias", "model.module.weight"]


def test_the_whole_model_comes_back_in_place_and_scratch_stays(tmp_path):
    saved, target = randomise(Net(), 1), randomise(Net(), 2)
    saved(torch.randn(8, 4))
    scratch, parameters = target.scratch.clone(), list(target.parameters())
    save_once(tmp_path, {"model": saved})
    load_once(tmp_path, {"model": target})
    assert contents(target) == contents(saved)
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    assert bits(target.scratch) == bits(scratch)
    assert not target.frozen.requires_grad


class ExtraState(nn.Module):
    def __init__(self, extra: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra",
    [
        {"scales": [torch.ones(3), 2.5], "name": "x", "pairs": {1: (2, 3)}},
        torch.arange(5),
        np.arange(4.0),
        torch.tensor(3.0),
        None,
        b"raw",
    ],
    ids=["tree", "tensor", "array", "scalar", "none", "bytes"],
)
def test_extra_state_of_any_kind(extra, tmp_path):
    model = nn.Sequential(ExtraState(extra), ExtraState(3))
    save_once(tmp_path, {"model": model})
    target = nn.Sequential(ExtraState(None), ExtraState(None))
    load_once(tmp_path, {"model": target})
    assert contents(target[0].extra) == contents(extra)
    assert target[1].extra == 3


class Tied(nn.Module):
    def __init__(self, tied: bool, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_restored_under_both_names(tmp_path):
    check_tied_weights_are_stored_once(tmp_path)


def check_tied_weights_are_stored_once(tmp_path) -> None:
    model = randomise(Tied(True), 1)
    optim = torch.optim.AdamW(model.parameters())
    model.embed.weight.grad = torch.ones(32, 64)
    optim.step()
    save_once(tmp_path, {"model": model, "optim": optim})
    whole = open_checkpoint(tmp_path)
    assert sum(t.nbytes for t in whole.manifest.tensors.values()) == 3 * 32 * 64 * 4 + 4
    assert sum(f.stat().st_size for f in data_files(tmp_path, 1)) == 4096 + 3 * 32 * 64 * 4 + 4
    assert {"model.embed.weight", "model.head.weight"} <= set(whole.names())
    assert bits(whole.read("model.head.weight")) == bits(model.embed.weight)
    target = randomise(Tied(True), 2)
    other = torch.optim.AdamW(target.parameters())
    load_once(tmp_path, {"model": target, "optim": other})
    assert target.head.weight is target.embed.weight
    assert contents(target) == contents(model)
    assert contents(other) == contents(optim)


def test_sabotage_tied_weights_not_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "memory_key", lambda _: object())
    must_notice(check_tied_weights_are_stored_once, tmp_path)


def test_tied_weights_fill_untied_ones(tmp_path):
    model, target = randomise(Tied(True), 1), randomise(Tied(False), 2)
    save_once(tmp_path, {"model": model})
    load_once(tmp_path, {"model": target})
    assert bits(target.head.weight) == bits(target.embed.weight) == bits(model.embed.weight)


def test_untied_weights_do_not_fill_tied_ones_by_chance(tmp_path):
    model, target = randomise(Tied(False), 1), randomise(Tied(True), 2)
    before = contents(target)
    save_once(tmp_path, {"model": model})
    with pytest.raises(MismatchError, match=r"model\.head\.weight: .*same memory as model\.embed"):
        load_once(tmp_path, {"model": target})
    assert contents(target) == before
    report = load_once(tmp_path, {"model": target}, strict=False)
    assert bits(target.head.weight) == bits(model.embed.weight)
    assert list(report.skipped) == ["model.head.weight"]


def test_an_optimizer_over_tied_weights_says_what_does_not_fit_untied_ones(tmp_path):
    model, target = randomise(Tied(True), 1), randomise(Tied(False), 2)
    optims = [torch.optim.SGD(m.parameters(), momentum=0.9) for m in (model, target)]
    save_once(tmp_path, {"model": model, "optim": optims[0]})
    with pytest.raises(MismatchError, match=r"head\.weight"):
        load_once(tmp_path, {"model": target, "optim": optims[1]})


# Odd tensors: the checkpoint sees a row-major array of the values, whatever the memory is like.

BASE = torch.arange(120.0)
ODD: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0),
    "empty_2d": lambda: torch.empty(3, 0, 2, dtype=torch.float64),
    "one_element_odd_stride": lambda: BASE.clone().as_strided((1,), (0,)),
    "transposed": lambda: torch.randn(5, 7).t(),
    "permuted": lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(9, 8)[1::2, ::3],
    "narrow": lambda: torch.randn(9, 8).narrow(0, 2, 4),
    "expanded": lambda: torch.randn(1, 4).expand(5, 4),
    "expanded_scalar": lambda: torch.tensor(2.0).expand(3, 2),
    "overlapping": lambda: BASE.clone().as_strided((6, 4), (2, 1)),
    "overlapping_windows": lambda: BASE.clone().unfold(0, 5, 2),
    "conj": lambda: torch.randn(4, 3, dtype=torch.complex64).conj(),
    "conj_transposed": lambda: torch.randn(4, 3, dtype=torch.complex128).mH,
    "neg": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "real_view": lambda: torch.randn(4, dtype=torch.complex64).real,
    "half_view_of_float": lambda: torch.randn(6).view(torch.float16)[1::2],
    "offset": lambda: torch.arange(40, dtype=torch.uint8)[3:24],
}


def as_parameter(tensor: torch.Tensor) -> Any:
    module = nn.Module()
    module.register_parameter("x", nn.Parameter(tensor, requires_grad=False))
    return module


def as_buffer(tensor: torch.Tensor) -> Any:
    module = nn.Module()
    module.register_buffer("x", tensor)
    return module


@pytest.mark.parametrize("holder", [as_parameter, as_buffer], ids=["lazy", "eager"])
def test_odd_tensors_come_back(holder, tmp_path):
    source = {name: holder(make()) for name, make in ODD.items()}
    target = {name: holder(make()) for name, make in ODD.items()}
    for module in target.values():
        if module.x.numel():
            # Through the memory itself: some of these views cannot be written as they are.
            memory = module.x.detach().resolve_conj().resolve_neg()
            memory.untyped_storage().fill_(1)
            module.x.detach().untyped_storage().fill_(1)
    strides = {name: module.x.stride() for name, module in target.items()}
    save_once(tmp_path, source)
    whole = open_checkpoint(tmp_path)
    load_once(tmp_path, target)
    for name, module in source.items():
        assert bits(whole.read(f"{name}.x")) == bits(module.x), name
        assert bits(target[name].x) == bits(module.x), name
        assert target[name].x.stride() == strides[name], name


def test_memory_that_several_tensors_share_comes_back_whole(tmp_path):
    def make(fill: float) -> dict[str, nn.Module]:
        memory = torch.full((30,), fill) * torch.arange(30)
        return {
            "whole": as_parameter(memory),
            "rows": as_parameter(memory.view(5, 6)),
            "columns": as_buffer(memory.view(5, 6).t()),
            "middle": as_buffer(memory[7:19]),
            "again": as_parameter(memory),
        }

    source, target = make(1.0), make(0.0)
    save_once(tmp_path, source)
    assert set(open_checkpoint(tmp_path).manifest.aliases) == {"again.x"}
    load_once(tmp_path, target)
    assert {k: contents(v) for k, v in target.items()} == {
        k: contents(v) for k, v in source.items()
    }


def test_what_was_saved_dense_fills_odd_memory_and_back(tmp_path):
    dense = torch.randn(6, 4)
    for name, odd in {
        "transposed": torch.zeros(4, 6).t(),
        "sliced": torch.zeros(12, 8)[::2, ::2],
        "plain": torch.zeros(6, 4),
    }.items():
        save_once(tmp_path / name, {"t": {"x": dense}})
        load_once(tmp_path / name, {"t": {"x": odd}})
        assert bits(odd) == bits(dense)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_tensor_larger_than_the_pool(chunks, tmp_path):
    size = 3 * CHUNK_NBYTES + 12345
    source = {
        "flat": as_parameter(torch.arange(size, dtype=torch.int32).to(torch.uint8)),
        "strided": as_parameter(torch.randn(3, CHUNK_NBYTES // 8).t()),
    }
    target = {name: as_parameter(torch.zeros_like(m.x)) for name, m in source.items()}
    with Checkpointer(tmp_path, source, pool_bytes=chunks * CHUNK_NBYTES, timeout_s=30.0) as ckpt:
        ckpt.save(1).wait_committed()
        ckpt.save(2).wait_committed()
        assert ckpt._job.attached.pool.nbytes <= chunks * CHUNK_NBYTES
    load_once(tmp_path, target)
    for name, module in source.items():
        assert bits(target[name].x) == bits(module.x)


def test_many_small_tensors_of_many_dtypes(tmp_path):
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex128]
    source = {f"t{i}": torch.full((i % 7,), i).to(kinds[i % 5]) for i in range(2000)}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    save_once(tmp_path, {"t": source})
    load_once(tmp_path, {"t": target})
    assert contents(target) == contents(source)


def test_nothing_but_values(tmp_path):
    state = {"progress": {"epoch": 3, "best": 0.25}}
    save_once(tmp_path, state)
    assert data_files(tmp_path, 1) == []
    target = {"progress": {"epoch": 0, "best": 0.0}}
    load_once(tmp_path, target)
    assert target == state


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), r"'model\.weight' is on the meta.*to_empty"),
        (lambda: as_buffer(torch.ones(3).to_sparse()), r"'model\.x'.*to_dense"),
        (lambda: as_buffer(torch.eye(3).to_sparse_csr()), r"'model\.x'.*to_dense"),
        (lambda: nn.LazyLinear(3), r"'model\.weight' of a lazy module.*run the module once"),
        (
            lambda: as_buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
            r"'model\.x' is a nested tensor",
        ),
        (
            lambda: as_buffer(torch.masked.masked_tensor(torch.ones(2), torch.ones(2) > 0)),
            r"'model\.x' is a MaskedTensor",
        ),
    ],
    ids=["meta", "sparse", "csr", "lazy", "nested", "subclass"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_has_no_plain_data_is_refused_by_name_and_the_root_stays_free(make, text, tmp_path):
    for _ in range(2):
        with pytest.raises(StateError, match=text):
            Checkpointer(tmp_path, {"model": make()})
    with Checkpointer(tmp_path, {"model": nn.Linear(2, 2)}) as ckpt:
        ckpt.save(1).wait_committed()


def test_a_tensor_that_becomes_unfit_is_refused_by_name(tmp_path):
    module = as_buffer(torch.ones(2))
    with Checkpointer(tmp_path, {"model": module}, audit=True) as ckpt:
        module.x = torch.ones(2, device="meta")
        with pytest.raises(StateError, match=r"'model\.x'"):
            ckpt.save(1)
        module.x = torch.full((2,), 2.0)
        ckpt.save(2).wait_committed()
        assert ckpt.all_steps() == [2]


def test_two_parts_of_one_name_are_refused(tmp_path):
    state = {"model": nn.ModuleDict({"a": nn.Linear(2, 2)}), "model.a": nn.Linear(2, 2)}
    with pytest.raises(StateError, match=r"both named 'model\.a\.weight'"):
        Checkpointer(tmp_path, state)


def test_the_pool_refuses_a_buffer_that_is_no_multiple_of_a_page():
    with pytest.raises(Exception, match="no multiple of"):
        BufferPool(1 << 20, 5000)
