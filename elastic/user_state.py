"""The user's own objects, put back where a step that has changed them is carried out again.

What is small is copied at a step's begin. What is large is only looked at, and must not be changed
inside of `with step:`: that is told at once, and not when a rank is lost.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from planaria.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Bytes of tensors up to which a part is copied at every step: some tens of microseconds.
SMALL_BYTES = 1 << 20


class UserState:
    """What the session was given as `state`.

    Args:
        parts: By name: with state_dict and load_state_dict, or dicts, lists and tensors.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = dict(parts)
        self._kept: dict[str, Any] = {}
        self._seen: dict[str, tuple[int, list[Any]]] = {}

    def begin(self) -> None:
        """Remembers everything as it is before a step."""
        self._kept, self._seen = {}, {}
        for name, part in self._parts.items():
            value = _value(part)
            size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
            if size <= SMALL_BYTES:
                self._kept[name] = _copied(value)
            else:
                self._seen[name] = size, _signs(value)

    def check(self) -> None:
        """Makes sure, after a step's micro-batches, that what is large is as it was.

        Raises:
            ConfigError: Names a part that is not.
        """
        for name, (size, signs) in self._seen.items():
            if _signs(_value(self._parts[name])) != signs:
                raise ConfigError(
                    f"state[{name!r}] ({size / 1e6:.0f} MB) was changed inside of `with step:`, "
                    "which may be carried out several times: change it once step.committed"
                )

    def put_back(self) -> dict[str, Any]:
        """Makes all of it what it was when the step began; returns what it was until now."""
        now = {name: _copied(_value(self._parts[name])) for name in self._kept}
        self.put(self._kept)
        return now

    def put(self, values: Mapping[str, Any]) -> None:
        """Puts values in place, that :meth:`put_back` has returned."""
        for name, value in values.items():
            part = self._parts[name]
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(_copied(value))
            else:
                _write(part, value)


def _value(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _tensors(value: Any) -> "Iterator[torch.Tensor]":
    if _is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _signs(value: Any) -> list[Any]:
    """What differs once any tensor was written or replaced."""
    return [(tensor.data_ptr(), tensor._version) for tensor in _tensors(value)]


def _copied(value: Any) -> Any:
    """A copy that shares nothing; containers of its own kinds keep them."""
    if _is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update((key, _copied(each)) for key, each in value.items())
        return found
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _write(live: Any, value: Any) -> Any:
    """Makes a container or tensor hold a value, in place; returns what belongs in its place."""
    if _is_tensor(live) and _is_tensor(value) and live.shape == value.shape:
        import torch

        with torch.no_grad():
            return live.copy_(value)
    if isinstance(live, dict) and isinstance(value, dict):
        merged = {key: _write(live.get(key), each) for key, each in value.items()}
        live.clear()
        live.update(merged)
        return live
    if type(live) is list and type(value) is list:
        there = len(live)
        live[:] = [_write(live[i] if i < there else None, each) for i, each in enumerate(value)]
        return live
    return _copied(value)
