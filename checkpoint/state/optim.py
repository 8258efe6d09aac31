"""Optimizers of any kind: slots and settings belong to a parameter, and carry its name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from planaria.checkpoint.state import tree
from planaria.checkpoint.state.dtensors import slot_like
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.provider import LoadPlan
from planaria.errors import StateError

#: Finds the name of a parameter among the modules of the state, None if it is in none of them.
ParameterNames = Callable[[], dict[int, tuple[str, str]]]


class OptimizerProvider:
    """State of one torch.optim optimizer.

    Slots that are plain tensors become ``<key>.<parameter>.<slot>``; everything else that an
    optimizer keeps for a parameter (counters, lists of vectors) goes into an object
    ``<key>.<parameter>``. State that does not exist yet when restoring is created.

    Args:
        key: Name of the optimizer in the state.
        optimizer: The optimizer.
        parameter_names: Returns id(parameter) -> (key of its module, its name there).
    """

    def __init__(self, key: str, optimizer: Optimizer, parameter_names: ParameterNames) -> None:
        self.key, self.optimizer, self._parameter_names = key, optimizer, parameter_names
        self._full: dict[torch.Tensor, str] = {}  # names with their module's, where there is one
        # Of the last walk: what parameters have beside tensors, and their names in each group.
        self._beside: dict[str, Any] = {}
        self._grouped: list[list[str]] = []

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`."""
        names = self._names()
        self._refuse_taken_name(names)
        self._refuse_foreign_state(names)

        def keep(path: str, tensor: torch.Tensor) -> bool:
            out.tensor(path, tensor, lazy=True)
            return True

        self._beside = {}
        for parameter, name in names.items():
            slots = self.optimizer.state.get(parameter)
            if not slots:
                continue
            path = f"{self.key}.{name}"
            encoded = tree.encode(dict(slots), path, keep)
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_cpu:
                    encoded[slot]["on"] = "parameter"
            plain = {s: {tree.TAG: "tensor", "ref": f"{path}.{s}"} for s in slots}
            if encoded != plain:
                self._beside[path] = encoded
        self._grouped = [[names[p] for p in g["params"]] for g in self.optimizer.param_groups]
        self.recollect(out)

    def look(self, signs: list[Any], things: list[Any]) -> None:
        """See `Recallable.look`."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        things += state
        for slots in state.values():
            signs += slots
            signs.append(len(slots))
            things += slots.values()
        for group in groups:
            things += group["params"]
            signs.append(len(group["params"]))
        signs += (len(state), len(groups))

    def can_recall(self) -> bool:
        """See `Recallable.can_recall`."""
        return True

    def recollect(self, out: Collector) -> None:
        """See `Recallable.recollect`: settings may be others in each step."""
        for path, encoded in self._beside.items():
            out.object(path, encoded)
        groups = [
            {
                "optimizer": type(self.optimizer).__name__,
                "params": names,
                "settings": tree.encode(
                    {k: v for k, v in group.items() if k != "params"}, f"{self.key}.param_groups"
                ),
            }
            for group, names in zip(self.optimizer.param_groups, self._grouped, strict=True)
        ]
        out.object(f"{self.key}.param_groups", groups)

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`."""
        names = self._names()
        slots: dict[str, list[str]] = {name: [] for name in names.values()}
        prefix = f"{self.key}."
        for full in plan.names(prefix):
            owner = _owner(full[len(prefix) :], slots)
            if owner is not None:
                slots[owner].append(full)
        settings = self._load_groups(plan, names)
        for parameter, name in names.items():
            path, stored = f"{prefix}{name}", slots[name]
            if self._other_shape(plan, parameter):
                plan.used.update((path, *stored))
                plan.problems.append(f"{path}: state of a parameter that has another shape here")
            elif stored or set(self._names_before(plan, parameter, name)) <= settings:
                self._load_slots(plan, parameter, name, stored)

    def _load_slots(
        self, plan: LoadPlan, parameter: torch.Tensor, name: str, stored: list[str]
    ) -> None:
        path = f"{self.key}.{name}"
        live = self.optimizer.state.get(parameter, {})
        encoded = None
        for before in self._names_before(plan, parameter, name):
            found = plan.object(f"{self.key}.{before}", optional=True)
            encoded = _moved(found, f"{self.key}.{before}.", f"{path}.") if found else encoded
        if encoded is None:
            encoded = {n[len(path) + 1 :]: {tree.TAG: "tensor", "ref": n} for n in stored}
        on_parameter = {v["ref"] for v in encoded.values() if isinstance(v, dict) and "on" in v}
        existing = {f"{path}.{slot}": v for slot, v in live.items()}
        made: dict[str, torch.Tensor] = {}
        for slot in tree.references(encoded):
            source = plan.sources.get(slot)
            if source is None:
                plan.missing.append(slot)
                return
            tensor = existing.get(slot)
            if (
                not isinstance(tensor, torch.Tensor)
                or tuple(tensor.shape) != source.shape
                or tensor.dtype != source.dtype.dtype
            ):
                tensor = _new_slot(source.shape, source.dtype.dtype, parameter,
                                   slot in on_parameter)  # fmt: skip
            if not plan.tensor(slot, tensor):
                return
            made[slot] = tensor
        slots = tree.decode(encoded, made.__getitem__)

        def finish() -> None:
            if slots:
                self.optimizer.state[parameter] = slots
            else:
                self.optimizer.state.pop(parameter, None)

        if plan.wanted(path):
            plan.then(finish)

    def _load_groups(self, plan: LoadPlan, names: dict[torch.Tensor, str]) -> set[str]:
        """Returns the names of all parameters that the stored groups had."""
        path = f"{self.key}.param_groups"
        settings: dict[str, Any] = {}  # by parameter name: groups may be cut otherwise now
        empty: list[Any] = []
        for groups in plan.objects_of_all_ranks(path):
            kinds = {g.get("optimizer") for g in groups} - {type(self.optimizer).__name__}
            if kinds:
                plan.problems.append(
                    f"{path}: saved by {' and '.join(sorted(map(str, kinds)))}, restored into "
                    f"{type(self.optimizer).__name__}"
                )
            settings.update((name, dict(g["settings"])) for g in groups for name in g["params"])
            empty = [g["settings"] for g in groups if not g["params"]]
        if not settings and not empty:
            return set()
        for i, group in enumerate(self.optimizer.param_groups):
            found = []
            for parameter in group["params"]:
                before = self._names_before(plan, parameter, names[parameter])
                found += [settings[name] for name in before if name in settings]
                if not all(name in settings for name in before):
                    plan.missing.append(f"{path} of {names[parameter]}")
            if not group["params"] and empty:
                found = [empty.pop(0)]
            if any(f != found[0] for f in found):
                members = ", ".join([names[p] for p in group["params"]][:5])
                plan.problems.append(
                    f"{path}: group {i} joins parameters that had different settings: {members}"
                )
            elif found:
                plan.then(partial(_set_group, group, tree.decode(found[0])))
        return set(settings)

    def _other_shape(self, plan: LoadPlan, parameter: torch.Tensor) -> bool:
        """Whether the checkpoint knows the parameter with another shape."""
        source = plan.sources.get(self._full.get(parameter, ""))
        return source is not None and source.shape != tuple(parameter.shape)

    def _names_before(self, plan: LoadPlan, parameter: torch.Tensor, name: str) -> list[str]:
        """What this optimizer called the parameter before it was renamed, fused or split."""
        full = self._full.get(parameter, "")
        source = plan.sources.get(full)
        if source is None or plan.manifest.resolve(full) is not None:
            return [name]
        beginning = full.removesuffix(name)  # the module's, where the optimizer leaves it out
        stored = dict.fromkeys(p.stored for p in source.parts if p.stored is not None)
        return [n.removeprefix(beginning) for n in stored]

    def _names(self) -> dict[torch.Tensor, str]:
        """This optimizer's parameters with their names, in group order."""
        table = self._parameter_names()
        groups = self.optimizer.param_groups
        modules = {table[id(p)][0] for g in groups for p in g["params"] if id(p) in table}
        names: dict[torch.Tensor, str] = {}
        self._full.clear()
        for i, group in enumerate(groups):
            for j, parameter in enumerate(group["params"]):
                if id(parameter) not in table:
                    names[parameter] = f"group{i}.param{j}"
                else:
                    module, name = table[id(parameter)]
                    self._full[parameter] = f"{module}.{name}"
                    names[parameter] = f"{module}.{name}" if len(modules) > 1 else name
        return names

    def _refuse_taken_name(self, names: dict[torch.Tensor, str]) -> None:
        if "param_groups" in names.values():
            raise StateError(
                f"optimizer {self.key!r} has a parameter named 'param_groups', which is the name "
                "that its settings are stored under; rename the parameter"
            )

    def _refuse_foreign_state(self, names: dict[torch.Tensor, str]) -> None:
        foreign = [k for k in self.optimizer.state if k not in names]
        if foreign:
            kind = type(foreign[0]).__name__
            raise StateError(
                f"optimizer {self.key!r} keeps state for a {kind} that is none of its parameters; "
                "such state has no name to be stored under"
            )


def _owner(rest: str, parameters: dict[str, list[str]]) -> str | None:
    """The parameter that a slot belongs to: ``blocks.0.weight.exp_avg`` -> ``blocks.0.weight``."""
    name = rest
    while "." in name:
        name = name.rpartition(".")[0]
        if name in parameters:
            return name
    return None


def _moved(encoded: Any, old: str, new: str) -> Any:
    """The same data, with references to tensors below `old` as ones to those below `new`."""
    if isinstance(encoded, list):
        return [_moved(v, old, new) for v in encoded]
    if not isinstance(encoded, dict):
        return encoded
    moved = {k: _moved(v, old, new) for k, v in encoded.items()}
    if tree.references(encoded) == [encoded.get("ref")] and encoded["ref"].startswith(old):
        moved["ref"] = new + encoded["ref"].removeprefix(old)
    return moved


def _new_slot(
    shape: tuple[int, ...], dtype: torch.dtype, parameter: torch.Tensor, on_parameter: bool
) -> torch.Tensor:
    if not shape:
        # Step counters live on the host unless the optimizer is fused or capturable.
        device = parameter.device if on_parameter else torch.device("cpu")
        return torch.zeros((), dtype=dtype, device=device)
    if isinstance(parameter, DTensor):
        return slot_like(shape, dtype, parameter)
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _set_group(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        live = group.get(key)
        if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor | float | int):
            live.copy_(torch.as_tensor(value))  # others may hold on to this very tensor
        else:
            group[key] = value
