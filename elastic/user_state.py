"""The user's own objects, put back where a step that has changed them is carried out again.

What is small is copied at a step's begin. What is large is only looked at, and must not be changed
inside of `with step:`: that is told at once, and not when a rank is lost.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from planaria.elastic.replicated import digest_tensor
from planaria.errors import ConfigError

#: Bytes of tensors, arrays and bytes up to which a part is copied at every step: some tens of
#: microseconds.
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
        self._makes_copies: dict[str, bool] = {}

    def begin(self) -> None:
        """Remembers everything as it is before a step."""
        self._kept, self._seen = {}, {}
        for name, part in self._parts.items():
            value = _value(part)
            size = sum(map(_nbytes, _leaves(value)))
            if size <= SMALL_BYTES:
                self._kept[name] = _copied(value)
            else:
                if name not in self._makes_copies:
                    # The first value is still there: what is at another place is another tensor.
                    self._makes_copies[name] = _signs(_value(part)) != _signs(value)
                self._seen[name] = size, self._look(name, value)

    def check(self) -> None:
        """Makes sure, after a step's micro-batches, that what is large is as it was.

        Raises:
            ConfigError: Names a part that is not.
        """
        for name, (size, signs) in self._seen.items():
            if self._look(name, _value(self._parts[name])) != signs:
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

    def _look(self, name: str, value: Any) -> list[Any]:
        return _signs(value, contents=self._makes_copies[name])


def _value(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _leaves(value: Any) -> Iterator[Any]:
    """All that containers hold, and the keys by which they do."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, bytes | bytearray):
        return len(leaf)
    return int(getattr(leaf, "nbytes", 0))  # of tensors and of arrays


def _signs(value: Any, *, contents: bool = False) -> list[Any]:
    """What differs once anything was written or replaced.

    Args:
        value: Tensors, arrays and plain values, in containers.
        contents: Whether tensors are compared by what they hold. Else they are looked at alone.
    """
    return [_sign(leaf, contents=contents) for leaf in _leaves(value)]


def _sign(leaf: Any, *, contents: bool) -> Any:
    import numpy as np

    from planaria.checkpoint.format.checksum import checksum

    if _is_tensor(leaf):
        if contents:
            return str(leaf.dtype), tuple(leaf.shape), digest_tensor(leaf, None)
        return leaf.data_ptr(), None if leaf.is_inference() else leaf._version
    if isinstance(leaf, np.ndarray):
        data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return leaf.dtype.str, leaf.shape, checksum(data)
    # Plain values; of bytes the text would be four times as long.
    return hash(bytes(leaf)) if isinstance(leaf, bytes | bytearray) else repr(leaf)


def _copied(value: Any) -> Any:
    """A copy that shares nothing; containers of its own kinds keep them."""
    if _is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        found = copy.copy(value)
        for key, each in value.items():  # a Counter's update() would count them
            found[key] = _copied(each)
        return found
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _kind(tensor: Any) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


def _write(live: Any, value: Any) -> Any:
    """Makes a container or tensor hold a value, in place; returns what belongs in its place."""
    if _is_tensor(live) and _is_tensor(value) and _kind(live) == _kind(value):
        import torch

        with torch.inference_mode() if live.is_inference() else torch.no_grad():
            return live.copy_(value)
    if isinstance(live, dict) and isinstance(value, dict):
        merged = {key: _write(live.get(key), each) for key, each in value.items()}
        live.clear()
        for key, each in merged.items():
            live[key] = each
        return live
    if type(live) is list and type(value) is list:
        there = len(live)
        live[:] = [_write(live[i] if i < there else None, each) for i, each in enumerate(value)]
        return live
    return _copied(value)
