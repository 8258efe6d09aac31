"""HF `generate` on weights that follow a trainer: the reference of all adapters.

Updates are written in place, so tied weights, `torch.compile`, PEFT or DDP wrappers and views that
others hold stay what they are. Between which calls weights may change is the caller's choice:
``boundary="request"`` keeps one version for a whole `generate`; ``boundary="token"`` lets them
change between two tokens, so that long answers need not end first (their key-value cache then holds
states of older versions, as with every engine that updates in flight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError
from planaria.rl_sync.layout.target import tensors_of
from planaria.rl_sync.reports import UpdateReport
from planaria.rl_sync.subscriber import Subscriber
from planaria.rl_sync.transports.feed import Feed


class Generated(NamedTuple):
    """What `generate` returned, stamped.

    Attributes:
        output: As it is.
        first_version: The version that was served when it began.
        last_version: The one that was served at its end; the same with ``boundary="request"``.
    """

    output: Any
    first_version: int
    last_version: int


class GenerateWorker:
    """A model with `generate`, like transformers' `GenerationMixin`, that follows a trainer."""

    def __init__(
        self,
        model: nn.Module,
        url: str | Feed,
        token: bytes | None = None,
        *,
        boundary: str = "request",
        **options: Any,
    ) -> None:
        """Wraps a model.

        Args:
            model: The model, or a wrapper of it that has `generate`.
            url: Where the publisher's versions are.
            token: The job's token.
            boundary: ``request`` or ``token``.
            **options: Further arguments of `Subscriber`.

        Raises:
            ConfigError: The boundary is neither, or the model cannot generate.
        """
        if boundary not in ("request", "token"):
            raise ConfigError(f"boundary is request or token, not {boundary!r}")
        if not callable(getattr(model, "generate", None)):
            raise ConfigError(f"{type(model).__name__} has no generate()")
        self.model, self._boundary = model, boundary
        self.subscriber = Subscriber(plain_tensors(model), url, token, **options)
        self._undo: Callable[[], None] | None = None
        if boundary == "token":
            self._undo = self.subscriber.gate.guard(model, 600.0)

    def update(
        self, at_least: int | None = None, timeout: float | None = None
    ) -> UpdateReport | None:
        """See `Subscriber.update`; may be called in another thread than `generate`."""
        return self.subscriber.update(at_least, timeout)

    def generate(self, *args: Any, **kwargs: Any) -> Generated:
        """Calls the model's `generate` within the boundary.

        Raises:
            StaleError: Nothing is served yet, or it is too old.
        """
        generate: Any = self.model.generate
        if self._boundary == "request":
            with self.subscriber.serving() as version:
                return Generated(generate(*args, **kwargs), version, version)
        with self.subscriber.serving() as first:
            pass
        output = generate(*args, **kwargs)
        with self.subscriber.gate.serving(Deadline(600.0)):
            last = self.subscriber.version
        return Generated(output, first, first if last is None else last)

    def close(self) -> None:
        """Ends following; the model keeps the weights that it has."""
        if self._undo is not None:
            self._undo()
        self.subscriber.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plain_tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """A model's tensors under the names of the model that PEFT or another wrapper has wrapped.

    Adapters' own tensors keep their names; without adapters these are the names of the checkpoint.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(model).items():
        for prefix in ("base_model.model.", "base_model."):
            name = name.removeprefix(prefix)
        found[name.replace(".base_layer.", ".")] = tensor
    return found
