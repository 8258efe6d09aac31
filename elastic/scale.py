"""Scaling the loss of float16 models, the same on all ranks."""

import math
from typing import Any

from planaria.errors import ConfigError

#: As `torch.amp.GradScaler`.
INITIAL, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000
#: The smallest normal number of float32. What is not finite with that never will be; 0 could not be
#: divided by.
LEAST = 2.0**-126


class LossScale:
    """What the loss is multiplied with, so that small gradients do not vanish in float16.

    Halved where a gradient was not finite (the step is then left out), doubled after 2000 steps
    that were. It follows from the steps alone, so all ranks have the same.

    Args:
        scale: "dynamic", or a number that stays.

    Attributes:
        value: The scale of the next step.

    Raises:
        ConfigError: It is neither.
    """

    def __init__(self, scale: float | str) -> None:
        self.value, self._good = INITIAL, 0
        self._dynamic = scale == "dynamic"
        if not self._dynamic:
            if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
                raise ConfigError(f"loss_scale={scale!r}: give 'dynamic', or a number above 0")
            self.value = float(scale)

    def update(self, finite: bool) -> None:
        """Notes whether the gradient of a step was finite."""
        if not self._dynamic:
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(self.value * BACKOFF, LEAST)
        elif self._good == INTERVAL:
            self.value, self._good = self.value * GROWTH, 0

    def state_dict(self) -> dict[str, Any]:
        """The scale, and how many steps in a row were finite."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state."""
        self.value, self._good = float(state["value"]), int(state["good"])
