"""What a session cannot keep the same on all ranks: refused, by name.

What BatchNorm keeps in buffers depends on which micro-batches a rank saw, so it would differ
between ranks, and the run's result would depend on who computed what. A parameter that needs a
gradient only later has no place in the sums.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from planaria.elastic.replicated import digest_tensor
from planaria.errors import ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

_ADVICE = (
    "its value would depend on which rank computed which micro-batch. Use a layer without running "
    "statistics (LayerNorm, GroupNorm, track_running_stats=False), or .eval() the layer"
)


def refuse_running_statistics(model: "torch.nn.Module") -> None:
    """Makes sure that no layer of the model is about to update statistics.

    Raises:
        NotSupportedError: Names the first that is.
    """
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and module.training:
            raise NotSupportedError(
                f"{name or 'the model'!r} is a {type(module).__name__} that writes the buffer "
                f"running_mean in forward: {_ADVICE}"
            )


#: So many steps have the contents of buffers compared, too: what goes by `.data` or numpy changes
#: no version. Such layers write at every step, so the first ones tell.
_CONTENTS_STEPS = 2


class BufferGuard:
    """Notices that a buffer was written, or replaced, while micro-batches were computed.

    Those that are not saved with the model (``persistent=False``) count, too: a table that grows
    with the longest sequence so far, say, differs between ranks as statistics do.

    Args:
        model: The model.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        self._model = model
        self._steps = 0
        self._seen: dict[str, tuple[torch.Tensor, Any]] = {}

    def begin(self) -> None:
        """Remembers the buffers as they are, before a step's micro-batches."""
        self._steps += 1
        # The tensors themselves: the id of one that is gone would be given to another.
        self._seen = {name: (buffer, self._sign(buffer)) for name, buffer in self._buffers()}

    def check(self) -> None:
        """Compares, after a micro-batch.

        Raises:
            NotSupportedError: Names a buffer that is not as it was.
        """
        for name, buffer in self._buffers():
            before, sign = self._seen.get(name, (buffer, None))
            if before is not buffer or (sign is not None and sign != self._sign(buffer)):
                raise NotSupportedError(f"buffer {name!r} was written in forward: {_ADVICE}")

    def _sign(self, buffer: "torch.Tensor") -> Any:
        looked = buffer.data_ptr(), None if buffer.is_inference() else buffer._version
        if self._steps > _CONTENTS_STEPS:
            return looked
        return *looked, digest_tensor(buffer, None)

    def _buffers(self) -> "Iterator[tuple[str, torch.Tensor]]":
        for prefix, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{prefix}.{name}" if prefix else name, buffer


def refuse_wrappers(model: "torch.nn.Module") -> None:
    """Makes sure that nothing else sums the model's gradients, or has cut its parameters.

    Raises:
        NotSupportedError: Something does; names it.
    """
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    for wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        if wrapper in names:
            raise NotSupportedError(
                f"the model is wrapped in {wrapper}, and a session sums gradients itself: give it "
                "the plain module"
            )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise NotSupportedError(
            "the model's parameters are DTensors (FSDP2 or tensor parallel), and a session cuts "
            "them itself: give it the plain module, or use a Checkpointer without a session"
        )


def trained_parameters(model: "torch.nn.Module") -> "dict[str, torch.nn.Parameter]":
    """The parameters that need a gradient, by name, as checkpoints name them.

    So ``torch.compile`` and the like add nothing to a name. One that is shared is there once.
    """
    from planaria.checkpoint.state.modules import named_parameters

    found: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


class FrozenGuard:
    """Notices parameters that are unfrozen while a session runs: nobody would train them.

    The other way round is no matter: a parameter that is frozen later is left as it is.

    Args:
        model: The model, its parameters frozen that are to be.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        self._frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}

    def check(self) -> None:
        """Looks, before a step.

        Raises:
            ConfigError: Names one that needs a gradient now.
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise ConfigError(
                    f"{name!r} was frozen when the session was made, and needs a gradient now: it "
                    "would not be trained. Freeze it again with .requires_grad_(False) until it is "
                    "its turn, but make the session with all that will ever be trained unfrozen; "
                    "or end this session and make another one"
                )
