"""Trees of ordinary Python values as JSON, exactly, without pickle.

What JSON has is kept as it is; the rest is tagged: ``{"$": "tuple", "v": [...]}``. Tensors and
arrays become references to named tensors, or stand inline where no sink for them is given.
"""

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any

import numpy as np
import torch

from planaria.checkpoint.format.dtypes import dtype_by_name, raw_bytes, stored_dtype
from planaria.checkpoint.state.entries import check_plain
from planaria.errors import CorruptError, StateError

TAG = "$"
#: How deep containers may be nested. Each level costs several frames of the interpreter's stack
#: when it is read again, which may happen much deeper in a program than the save did.
MAX_DEPTH = 64
#: Takes a tensor and its name; True if it keeps it (the tree then holds a reference to the name),
#: False to have it inline.
TensorSink = Callable[[str, torch.Tensor], bool]
#: Returns the tensor of a name.
TensorSource = Callable[[str], torch.Tensor]

# Python turns integers of up to 4300 digits into text and back.
_MAX_INT_BITS = 14_000
_NUMBERS = "biufc"  # kinds of numpy dtypes
_MALFORMED = LookupError, TypeError, ValueError, AttributeError, ArithmeticError
_FACTORIES: dict[str, type] = {"int": int, "float": float, "list": list, "dict": dict, "set": set}
_SEQUENCES: dict[str, type] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}
_SEQUENCE_TAGS = {kind: tag for tag, kind in _SEQUENCES.items()}


def encode(value: Any, path: str, sink: TensorSink | None = None) -> Any:
    """Turns a value into JSON data.

    Args:
        value: A tree of dicts, sequences, numbers, strings, bytes, arrays and tensors.
        path: Its name, which error messages and tensor names start with.
        sink: Receives tensors by name; None keeps them inline.

    Raises:
        StateError: The tree holds something that cannot be stored; says where.
    """
    try:
        return _encode(value, path, sink, 0)
    except RecursionError as error:
        raise StateError(f"state {path!r} contains itself or is nested too deeply") from error


def _encode(value: Any, path: str, sink: TensorSink | None, depth: int) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        _check_int(value, path)
        return value
    if kind is float:
        return value if math.isfinite(value) else {TAG: "float", "v": repr(value)}
    if depth > MAX_DEPTH:
        raise StateError(f"state {_short(path)!r} contains itself, or is nested more than "
                         f"{MAX_DEPTH} deep; flatten it")  # fmt: skip
    if kind is list:
        if _all_short_ints(value):
            return value.copy()
        return [_encode(v, f"{path}.{i}", sink, depth + 1) for i, v in enumerate(value)]
    if kind in (dict, OrderedDict, Counter, defaultdict):
        return _encode_dict(value, path, sink, depth + 1)
    if kind in _SEQUENCE_TAGS:
        items = _sorted(value, path) if kind in (set, frozenset) else value
        if kind is tuple and _all_short_ints(items):
            return {TAG: "tuple", "v": list(items)}
        encoded = [_encode(v, f"{path}.{i}", sink, depth + 1) for i, v in enumerate(items)]
        return {TAG: _SEQUENCE_TAGS[kind], "v": encoded}
    if isinstance(value, torch.Tensor):
        if sink is not None and sink(path, value):
            return {TAG: "tensor", "ref": path}
        return {TAG: "tensor", **_inline(value, path)}
    if isinstance(value, np.ndarray):
        tensor = _as_tensor(value, path)
        if sink is not None and sink(path, tensor):
            return {TAG: "ndarray", "ref": path}
        return {TAG: "ndarray", **_inline(tensor, path)}
    if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:
        return {TAG: "scalar", "dtype": value.dtype.str, "v": _base64(value.tobytes())}
    if kind is complex:
        return {TAG: "complex", "v": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray) and kind in (bytes, bytearray):
        return {TAG: kind.__name__, "v": _base64(bytes(value))}
    if kind is torch.dtype:
        return {TAG: "dtype", "v": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {TAG: "device", "v": str(value)}
    raise StateError(
        f"state {path!r} holds a {kind.__module__}.{kind.__qualname__}, which cannot be stored "
        "without pickle; return plain values from its state_dict(), or leave it out"
    )


def _all_short_ints(values: Any) -> bool:
    """Whether there is nothing to look at one by one: Python's generator alone has 625 integers."""
    return set(map(type, values)) == {int} and -(1 << 62) < min(values) <= max(values) < 1 << 62


def _check_int(value: int, path: str) -> None:
    if value.bit_length() > _MAX_INT_BITS:
        raise StateError(f"state {path!r} holds an integer of {value.bit_length()} bits, which is "
                         f"more than can be stored ({_MAX_INT_BITS}); store its bytes instead "
                         "(int.to_bytes)")  # fmt: skip


def _sorted(items: set[Any] | frozenset[Any], path: str) -> list[Any]:
    """The items in an order of their own, so that equal sets are equal on all ranks."""
    for item in items:
        if type(item) is int:
            _check_int(item, path)
    return sorted(items, key=repr)


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:150]}...{path[-40:]}"


def _encode_dict(value: dict[Any, Any], path: str, sink: TensorSink | None, depth: int) -> Any:
    kind = type(value).__name__
    plain = all(type(k) is str for k in value) and TAG not in value
    if plain:
        data: Any = {k: _encode(v, f"{path}.{k}", sink, depth) for k, v in value.items()}
        if kind == "dict":
            return data
        data = [[k, v] for k, v in data.items()]
    else:
        data = [
            [_encode(k, f"{path} (a key)", None, depth), _encode(v, f"{path}.{k}", sink, depth)]
            for k, v in value.items()
        ]
    if isinstance(value, defaultdict):
        factory = getattr(value.default_factory, "__name__", "None")
        if value.default_factory is not None and _FACTORIES.get(factory) != value.default_factory:
            raise StateError(f"state {path!r} is a defaultdict of {value.default_factory}, which "
                             f"cannot be stored; known are {sorted(_FACTORIES)}")  # fmt: skip
        return {TAG: kind, "factory": factory, "v": data}
    return {TAG: kind, "v": data}


def _as_tensor(array: np.ndarray, path: str) -> torch.Tensor:
    """The array as a tensor, of the same memory where it is a plain one that may be written."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise StateError(f"state {path!r} is an array of dtype {array.dtype}, which cannot be "
                         "stored; use numbers that torch has, too") from error  # fmt: skip


def _inline(tensor: torch.Tensor, path: str) -> dict[str, Any]:
    check_plain(path, tensor)
    dtype = stored_dtype(tensor.dtype, path)
    return {
        "dtype": dtype.name,
        "shape": list(tensor.shape),
        "v": _base64(raw_bytes(tensor).numpy().tobytes()),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(data: Any, source: TensorSource | None = None) -> Any:
    """Inverse of `encode`.

    Raises:
        CorruptError: The data is not what `encode` writes.
    """
    try:
        return _decode(data, source)
    except (*_MALFORMED, RuntimeError) as error:
        raise CorruptError(f"a stored object cannot be read: {error!r}") from error


def _decode(data: Any, source: TensorSource | None) -> Any:
    if isinstance(data, list):
        return [_decode(v, source) for v in data]
    if not isinstance(data, dict):
        return data
    if TAG not in data:
        return {k: _decode(v, source) for k, v in data.items()}
    tag = data[TAG]
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode(v, source) for v in data["v"])
    if tag in ("dict", "OrderedDict", "Counter", "defaultdict"):
        pairs = [(_decode(k, source), _decode(v, source)) for k, v in data["v"]]
        if tag == "defaultdict":
            return defaultdict(_FACTORIES.get(data["factory"]), pairs)
        return {"dict": dict, "OrderedDict": OrderedDict, "Counter": lambda p: Counter(dict(p))}[
            tag
        ](pairs)
    if tag in ("tensor", "ndarray"):
        if "ref" in data:
            if source is None:
                raise CorruptError(f"object refers to tensor {data['ref']!r} where none can be")
            tensor = source(data["ref"])
        else:
            raw = bytearray(base64.b64decode(data["v"], validate=True))
            dtype = dtype_by_name(data["dtype"]).dtype
            flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
            tensor = flat.view(dtype).reshape(data["shape"]).clone()
        return tensor.numpy() if tag == "ndarray" else tensor
    if tag == "float":
        return float(data["v"])
    if tag == "complex":
        return complex(float(data["v"][0]), float(data["v"][1]))
    if tag in ("bytes", "bytearray"):
        raw = base64.b64decode(data["v"], validate=True)
        return raw if tag == "bytes" else bytearray(raw)
    if tag == "scalar":
        return np.frombuffer(base64.b64decode(data["v"]), dtype=np.dtype(data["dtype"]))[0]
    if tag == "dtype":
        if not isinstance(getattr(torch, data["v"], None), torch.dtype):
            raise CorruptError(f"a stored object is the unknown dtype {data['v']!r}")
        return getattr(torch, data["v"])
    if tag == "device":
        return torch.device(data["v"])
    raise CorruptError(f"a stored object has the unknown tag {tag!r}")


def references(data: Any) -> list[str]:
    """Names of all tensors that encoded data refers to."""
    if isinstance(data, list):
        return [name for v in data for name in references(v)]
    if not isinstance(data, dict):
        return []
    if data.get(TAG) in ("tensor", "ndarray") and "ref" in data:
        return [data["ref"]]
    return [name for v in data.values() for name in references(v)]


def unmatched(live: Any, new: Any, path: str) -> list[str]:
    """Names of the values that dicts of `live` hold, and those of `new` in their place do not."""
    if not isinstance(live, dict) or not isinstance(new, dict):
        return []
    return [
        name
        for k, v in live.items()
        if k == k  # NaN is no key that could be found again
        for name in (unmatched(v, new[k], f"{path}.{k}") if k in new else [f"{path}.{k}"])
    ]


def with_parents(names: Iterable[str]) -> set[str]:
    """The names, and those of all that they are parts of."""
    found = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def update_in_place(live: Any, new: Any, *, path: str = "", keep: Set[str] = frozenset()) -> Any:
    """Makes dicts and lists of `live` hold what `new` holds, keeping the containers themselves.

    Args:
        live: What is changed.
        new: What it is to hold.
        path: Name of `live`.
        keep: Names of parts of `live` that stay though `new` does not have them, `with_parents`.

    Returns:
        What belongs in the place of `live`: itself where it is a container of the same kind, or
        holds what must stay.
    """
    if isinstance(live, dict) and isinstance(new, dict):
        merged = {
            k: update_in_place(live.get(k), v, path=f"{path}.{k}", keep=keep)
            for k, v in new.items()
        }
        merged.update((k, v) for k, v in live.items() if k not in new and f"{path}.{k}" in keep)
        live.clear()
        live.update(merged)
        return live
    if type(live) is list and type(new) is list:
        merged = [
            update_in_place(live[i] if i < len(live) else None, v, path=f"{path}.{i}", keep=keep)
            for i, v in enumerate(new)
        ]
        kept = any(f"{path}.{i}" in keep for i in range(len(new), len(live)))
        live[:] = merged + (live[len(new) :] if kept else [])
        return live
    if isinstance(live, dict | list) and path in keep:
        return live
    if (
        isinstance(live, np.ndarray)
        and isinstance(new, np.ndarray)
        and (live.flags.writeable, live.shape, live.dtype) == (True, new.shape, new.dtype)
    ):
        live[...] = new
        return live
    return new
