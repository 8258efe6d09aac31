"""Every optimizer: saved, restored into a fresh one and into a used one, and trained on."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from checkpoints import contents, load_once, randomise, save_once
from torch import nn, optim

from planaria.checkpoint import Checkpointer, Rename, open_checkpoint
from planaria.errors import MismatchError, StateError

Make = Callable[[Iterable[Any]], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd_fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adam_amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "adamw_foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "adamw_fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adamw_tensor_lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.01),
    "adagrad_fused": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, t0=2),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
    "lbfgs_search": lambda p: optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "muon": lambda p: optim.Muon(p, lr=0.1),
    "sparse_adam": lambda p: optim.SparseAdam(p, lr=0.1),
}


def model_for(name: str, seed: int = 1) -> Any:
    if name == "sparse_adam":
        return randomise(nn.Sequential(nn.Embedding(9, 4, sparse=True)), seed)
    bias = name != "muon"  # it takes matrices only
    return randomise(
        nn.Sequential(nn.Linear(9, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)), seed
    )


def train(model: Any, optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        if isinstance(model[0], nn.Embedding):
            data = torch.randint(0, 9, (4,), generator=generator)
        else:
            data = torch.randn(4, 9, generator=generator)

        def closure(data: torch.Tensor = data) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(data).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def start(name: str, seed: int = 1) -> dict[str, Any]:
    model = model_for(name, seed)
    return {"model": model, "optim": OPTIMIZERS[name](model.parameters())}


def test_every_dense_optimizer_of_torch_is_here():
    kinds = {k for k in vars(optim).values() if isinstance(k, type)} - {optim.Optimizer}
    kinds = {k for k in kinds if issubclass(k, optim.Optimizer)}
    assert kinds == {type(start(name)["optim"]) for name in OPTIMIZERS}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(name, tmp_path):
    state = start(name)
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        train(state["model"], state["optim"], range(2))
        ckpt.save(2)
        at_save = {k: contents(v) for k, v in copy.deepcopy(state).items()}
        train(state["model"], state["optim"], range(2, 5))
    expected = {k: contents(v) for k, v in state.items()}

    fresh, used = start(name, 2), start(name, 3)
    train(used["model"], used["optim"], range(7, 10))
    for target in (fresh, used):
        load_once(tmp_path, target)
        assert {k: contents(v) for k, v in target.items()} == at_save
        train(target["model"], target["optim"], range(2, 5))
        assert {k: contents(v) for k, v in target.items()} == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_from_before_the_first_step_clears_what_came_later(name, tmp_path):
    state = start(name)
    save_once(tmp_path, state, 0)
    train(state["model"], state["optim"], range(3))
    expected = {k: contents(v) for k, v in state.items()}
    used = start(name, 2)
    train(used["model"], used["optim"], range(5, 7))
    load_once(tmp_path, used)
    train(used["model"], used["optim"], range(3))
    assert {k: contents(v) for k, v in used.items()} == expected


def test_slots_carry_the_parameters_names_and_live_ones_are_kept(tmp_path):
    state = start("adamw")
    train(state["model"], state["optim"], range(1))
    save_once(tmp_path, state)
    names = [n for n in open_checkpoint(tmp_path).names() if n.startswith("optim.")]
    expected = [
        f"optim.{p}.{slot}"
        for p in dict(state["model"].named_parameters())
        for slot in ("exp_avg", "exp_avg_sq", "step")
    ]
    assert names == sorted(expected)
    slots = [dict(s) for s in state["optim"].state.values()]
    train(state["model"], state["optim"], range(1, 3))
    load_once(tmp_path, state)
    for before, now in zip(slots, state["optim"].state.values(), strict=True):
        assert all(before[k] is now[k] for k in before)


def groups_of(model: Any) -> list[dict[str, Any]]:
    first, second = model[0], model[2]
    return [
        {"params": [first.weight, second.weight], "weight_decay": 0.1},
        {"params": [], "lr": 0.5},
        {"params": [first.bias], "lr": 0.01, "betas": (0.5, 0.6)},
        {"params": [second.bias]},
    ]


def test_several_groups_empty_and_frozen(tmp_path):
    def make(seed: int) -> dict[str, Any]:
        model = model_for("adamw", seed)
        model[2].bias.requires_grad_(False)
        return {"model": model, "optim": optim.AdamW(groups_of(model), lr=0.1)}

    state, target = make(1), make(2)
    train(state["model"], state["optim"], range(2))
    state["optim"].param_groups[1]["lr"] = 0.75
    state["optim"].param_groups[3]["lr"] = 0.25
    save_once(tmp_path, state)
    load_once(tmp_path, target)
    assert contents(target["optim"]) == contents(state["optim"])
    assert target["optim"].param_groups[1]["lr"] == 0.75
    for one in (state, target):
        train(one["model"], one["optim"], range(2, 4))
    assert contents(target["model"]) == contents(state["model"])


def test_settings_follow_the_parameters_into_other_groups(tmp_path):
    model, other = model_for("adamw"), model_for("adamw", 2)
    state = {"model": model, "optim": optim.AdamW(groups_of(model), lr=0.1)}
    train(state["model"], state["optim"], range(2))
    save_once(tmp_path, state)
    cut = [
        {"params": [other[2].bias]},
        {"params": [other[0].bias]},
        {"params": [other[2].weight]},
        {"params": [other[0].weight]},
    ]
    target = {"model": other, "optim": optim.AdamW(cut, lr=0.7)}
    load_once(tmp_path, target)
    rates = [(g["lr"], g["weight_decay"], g["betas"]) for g in target["optim"].param_groups]
    assert rates == [
        (0.1, 0.01, (0.9, 0.999)),
        (0.01, 0.01, (0.5, 0.6)),
        (0.1, 0.1, (0.9, 0.999)),
        (0.1, 0.1, (0.9, 0.999)),
    ]
    for one in (state, target):
        train(one["model"], one["optim"], range(2, 4))
    assert contents(other) == contents(model)

    joined = {"model": other, "optim": optim.AdamW(other.parameters())}
    with pytest.raises(MismatchError, match="group 0 joins parameters that had different settings"):
        load_once(tmp_path, joined)


def test_several_optimizers_of_several_modules(tmp_path):
    def make(seed: int) -> dict[str, Any]:
        a, b = model_for("adamw", seed), model_for("adamw", seed + 10)
        both = [*a.parameters(), *b[0].parameters()]
        return {
            "a": a,
            "b": b,
            "optims": {"both": optim.Adam(both, lr=0.1), "rest": optim.SGD(b[2].parameters(), 0.1)},
        }

    def go(state: dict[str, Any], steps: Iterable[int]) -> None:
        chain = nn.Sequential(*state["a"], nn.Linear(3, 9), *state["b"])
        randomise(chain[3], 5)
        for step in steps:
            for one in state["optims"].values():
                one.zero_grad()
            data = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
            chain(data).square().sum().backward()
            for one in state["optims"].values():
                one.step()

    state, target = make(1), make(2)
    go(state, range(2))
    save_once(tmp_path, state)
    names = open_checkpoint(tmp_path).names()
    assert "optims.both.a.0.weight.exp_avg" in names
    assert "optims.both.b.0.weight.exp_avg" in names
    load_once(tmp_path, target)
    go(state, range(2, 4))
    go(target, range(2, 4))
    for key in ("a", "b"):
        assert contents(target[key]) == contents(state[key])
    assert contents(target["optims"]["both"]) == contents(state["optims"]["both"])


def test_parameters_outside_of_the_modules_have_names_too(tmp_path):
    def make(seed: int) -> dict[str, Any]:
        free = nn.Parameter(torch.full((3,), float(seed)))
        return {"t": {"free": free}, "optim": optim.Adam([free], lr=0.1)}

    state, target = make(1), make(2)
    state["t"]["free"].sum().backward()
    state["optim"].step()
    save_once(tmp_path, state)
    assert "optim.group0.param0.exp_avg" in open_checkpoint(tmp_path).names()
    load_once(tmp_path, target)
    assert contents(target["optim"]) == contents(state["optim"])
    assert contents(target["t"]) == contents(state["t"])


def test_a_group_that_was_added_later(tmp_path):
    def make(seed: int, grown: bool) -> dict[str, Any]:
        model = model_for("adamw", seed)
        optimizer = optim.AdamW(model[0].parameters(), lr=0.1)
        if grown:
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.3})
        return {"model": model, "optim": optimizer}

    state = make(1, False)
    train(state["model"], state["optim"], range(2))
    save_once(tmp_path / "before", state)
    state["optim"].add_param_group({"params": list(state["model"][2].parameters()), "lr": 0.3})
    train(state["model"], state["optim"], range(2, 4))
    save_once(tmp_path / "after", state)

    target = make(2, True)
    load_once(tmp_path / "after", target)
    assert contents(target["optim"]) == contents(state["optim"])

    target = make(3, True)
    train(target["model"], target["optim"], range(1))
    late = contents(target["optim"].state[target["model"][2].weight])
    before = contents(target["model"]), contents(target["optim"])
    with pytest.raises(MismatchError, match=r"optim\.param_groups of 2\.weight"):
        load_once(tmp_path / "before", target)
    assert (contents(target["model"]), contents(target["optim"])) == before
    report = load_once(tmp_path / "before", target, strict=False)
    assert "optim.param_groups of 2.weight" in report.missing
    assert contents(target["optim"].state[target["model"][2].weight]) == late


def test_a_tensor_for_a_learning_rate_stays_the_same_object(tmp_path):
    state = start("adamw_tensor_lr")
    state["optim"].param_groups[0]["lr"].fill_(0.25)
    save_once(tmp_path / "tensor", state)
    target = start("adamw_tensor_lr", 2)
    rate = target["optim"].param_groups[0]["lr"]
    load_once(tmp_path / "tensor", target)
    assert target["optim"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.25

    save_once(tmp_path / "number", start("adamw"))
    rate.fill_(0.5)
    load_once(tmp_path / "number", target)
    assert target["optim"].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)


def test_a_renamed_part_keeps_its_slots_and_settings(tmp_path):
    def make(name: str, seed: int, kind: str) -> dict[str, Any]:
        inner = model_for("adamw", seed)
        model = nn.ModuleDict({name: inner, "rest": nn.Linear(1, 1)})
        groups = [{"params": inner.parameters(), "lr": 0.2}, {"params": model["rest"].parameters()}]
        return {"model": model, "optim": OPTIMIZERS[kind](groups)}

    for kind in ("adamw", "momentum", "adafactor"):
        state, target = make("old", 1, kind), make("new", 2, kind)
        train(state["model"]["old"], state["optim"], range(2))
        # Not a tensor, so the slots are kept as an object that refers to tensors.
        state["optim"].state[state["model"]["old"][0].weight]["note"] = (1, "x")
        save_once(tmp_path / kind, state)
        slots = Rename("optim.old.*", "optim.new.*")
        load_once(tmp_path / kind, target, transforms=[Rename("model.old.*", "model.new.*"), slots])
        assert contents(target["optim"]) == contents(state["optim"])
        with pytest.raises(MismatchError, match=r"optim\.old"):
            load_once(tmp_path / kind, target, transforms=[Rename("model.old.*", "model.new.*")])


def test_state_of_another_shape_is_never_forced_on_a_parameter(tmp_path):
    state = start("adamw")
    train(state["model"], state["optim"], range(2))
    save_once(tmp_path, state)
    model = randomise(nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4)), 2)
    target = {"model": model, "optim": optim.AdamW(model.parameters(), lr=0.1)}
    with pytest.raises(MismatchError, match=r"optim\.2\.bias: state of a parameter that has"):
        load_once(tmp_path, target)
    report = load_once(tmp_path, target, strict=False)
    assert "optim.2.weight" in report.skipped
    train(model, target["optim"], range(2, 4))
    assert contents(target["optim"].state[model[0].weight]["step"]) == contents(torch.tensor(4.0))


def test_state_that_has_no_name_is_refused(tmp_path):
    state = start("momentum")
    state["optim"].state["global"] = {"x": torch.ones(2)}
    with pytest.raises(StateError, match="keeps state for a str"):
        Checkpointer(tmp_path, state)


def test_a_slot_that_cannot_be_stored_is_named(tmp_path):
    state = start("momentum")
    state["optim"].state[state["model"][0].bias] = {"odd": object()}
    with pytest.raises(StateError, match=r"'optim\.0\.bias\.odd'"):
        Checkpointer(tmp_path, state)


def test_a_parameter_that_is_named_as_the_settings_is_refused(tmp_path):
    model = nn.Module()
    model.param_groups = nn.Parameter(torch.ones(2))
    for optimizer in (optim.SGD(model.parameters(), 0.1), optim.Adam(model.parameters())):
        with pytest.raises(StateError, match=r"'optim' has a parameter named 'param_groups'.*rena"):
            Checkpointer(tmp_path, {"model": model, "optim": optimizer})
    deeper = nn.ModuleDict({"param_groups": nn.Linear(2, 1)})
    state = {"model": deeper, "optim": optim.Adam(deeper.parameters())}
    save_once(tmp_path, state)
    load_once(tmp_path, state)
