"""What all ranks have alike, and one that joins must be sent: everything but blocks.

Frozen parameters and buffers, the optimizer's settings, the scheduler and the user's own objects;
with an optimizer that every rank steps for itself, also all parameters and its state.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from planaria.errors import ConfigError, MismatchError, StateError

if TYPE_CHECKING:
    import torch

_OBJECTS = "objects"


class Replicated:
    """The parts that are equal on all ranks, as bytes and back.

    Args:
        model: The model.
        optimizer: The user's optimizer; where it is spread over blocks its state is not a part.
        parts: Further objects by name: with state_dict and load_state_dict, or dicts, lists and
            tensors that are changed in place.
        whole: Whether all parameters and the optimizer's state are a part.

    Raises:
        ConfigError: A part cannot be brought to another rank.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        optimizer: "torch.optim.Optimizer",
        parts: Mapping[str, Any],
        *,
        whole: bool,
    ) -> None:
        import torch

        from planaria.checkpoint.state import tree

        self._model, self._optimizer, self._whole = model, optimizer, whole
        self._parts = dict(parts)
        if whole:
            self._parts["optimizer"] = optimizer
        for name, part in self._parts.items():
            if not (_is_stateful(part) or isinstance(part, dict | list | torch.Tensor)):
                raise ConfigError(
                    f"state[{name!r}] is a {type(part).__name__}, which cannot be brought to a "
                    "rank that joins: give an object with state_dict and load_state_dict, or a "
                    "dict, list or tensor that is changed in place"
                )
            try:
                # Now, and not in the midst of the run when somebody joins.
                tree.encode(_value(part), f"state[{name!r}]", lambda path, tensor: True)
            except StateError as error:
                raise ConfigError(f"it cannot be brought to a rank that joins: {error}") from error

    def pack(self, *, model: bool = False) -> bytes:
        """Everything as bytes (safetensors).

        Args:
            model: Whether to add all parameters.
        """
        import torch
        from safetensors.torch import save

        from planaria.checkpoint.state import tree

        tensors: dict[str, torch.Tensor] = {}

        def keep(path: str, tensor: torch.Tensor) -> bool:
            tensors[path] = tensor.detach().clone(memory_format=torch.contiguous_format)
            return True

        objects: dict[str, Any] = {
            name: tree.encode(_value(part), f"part.{name}", keep)
            for name, part in self._parts.items()
        }
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        objects["groups"] = tree.encode(groups, "groups", keep)
        for name, tensor in self._tensors(model or self._whole):
            tensors[f"model.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        text = bytearray(json.dumps(objects).encode())
        return save({**tensors, _OBJECTS: torch.frombuffer(text, dtype=torch.uint8)})

    def unpack(self, data: bytes) -> None:
        """Takes over what another rank has packed.

        Raises:
            MismatchError: The other rank's model has other parts.
        """
        import torch
        from safetensors.torch import load

        from planaria.checkpoint.state import tree

        tensors = load(data)
        objects = json.loads(tensors.pop(_OBJECTS).numpy().tobytes())
        found = {name: tree.decode(value, tensors.__getitem__) for name, value in objects.items()}
        for name, part in self._parts.items():
            if name not in found:
                raise MismatchError(f"state[{name!r}] is not part of the run that was joined")
            if _is_stateful(part):
                part.load_state_dict(found[name])
            elif isinstance(part, torch.Tensor):
                part.copy_(found[name])
            else:
                tree.update_in_place(part, found[name], path=name)
        for group, settings in zip(self._optimizer.param_groups, found["groups"], strict=True):
            group.update(settings)
        live = dict(self._tensors(True))
        with torch.no_grad():
            for key, value in tensors.items():
                if key.startswith("model."):
                    name = key.removeprefix("model.")
                    if name not in live or live[name].shape != value.shape:
                        raise MismatchError(f"{name!r} differs from the model of the others")
                    live[name].copy_(value)

    def digest(self) -> str:
        """A hash of all parameters and buffers."""
        import torch

        found = hashlib.blake2b(digest_size=16)
        for name, tensor in self._tensors(True):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()

    def sample(self, count: int | None) -> str:
        """A hash of every parameter and buffer, see :func:`digest_tensor`."""
        found = hashlib.blake2b(digest_size=8)
        for _, tensor in self._tensors(True):
            found.update(digest_tensor(tensor, count))
        return found.hexdigest()

    def _tensors(self, whole: bool) -> "Iterator[tuple[str, torch.Tensor]]":
        for name, parameter in self._model.named_parameters():
            if whole or not parameter.requires_grad:
                yield name, parameter
        saved = self._model.state_dict(keep_vars=True)
        for name, buffer in self._model.named_buffers():
            if name in saved:  # the others are made by the model's constructor
                yield name, buffer


def digest_tensor(tensor: "torch.Tensor", count: int | None) -> bytes:
    """What differs between tensors that differ.

    Args:
        tensor: The tensor.
        count: So many elements are looked at, evenly spread; None for all.
    """
    import torch

    from planaria.checkpoint.format.checksum import checksum

    flat = tensor.detach().reshape(-1)
    if count is not None:
        flat = flat[:: max(1, flat.numel() // count)]
    if not (flat.is_cpu and flat.is_contiguous()):
        flat = flat.cpu().contiguous()
    return checksum(flat.view(torch.uint8).numpy()).to_bytes(8, "little")


def _value(part: Any) -> Any:
    return part.state_dict() if _is_stateful(part) else part


def _is_stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
