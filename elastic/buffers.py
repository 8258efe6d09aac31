"""Buffers that forward writes: refused, by name.

What BatchNorm keeps depends on which micro-batches a rank saw, so it would differ between ranks,
and the run's result would depend on who computed what.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planaria.errors import NotSupportedError

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


class BufferGuard:
    """Notices that a buffer was written, or replaced, while micro-batches were computed.

    Those that are not saved with the model (``persistent=False``) count, too: a table that grows
    with the longest sequence so far, say, differs between ranks as statistics do.

    Args:
        model: The model.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        self._model = model
        self._seen: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """Remembers the buffers as they are, before a step's micro-batches."""
        self._seen = dict(self._look())

    def check(self) -> None:
        """Compares, after a micro-batch.

        Raises:
            NotSupportedError: Names a buffer that is not as it was.
        """
        for name, sign in self._look():
            if self._seen.get(name, sign) != sign:
                raise NotSupportedError(f"buffer {name!r} was written in forward: {_ADVICE}")

    def _look(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for prefix, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    yield full, (id(buffer), buffer._version)
