"""The gate before the optimizer's step: nothing is changed that is still being captured.

torch calls the global hook before any optimizer's step, also under DDP, FSDP2, GradScaler and the
wrappers of Accelerate and DeepSpeed, where a hook on one object would be bypassed.
"""

import threading
import weakref
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook


class Gated(Protocol):
    """Something that captures in the background."""

    def before_update(self) -> None:
        """Returns once nothing is being captured any more."""
        ...


_gated: "weakref.WeakSet[Any]" = weakref.WeakSet()
_lock = threading.Lock()
_hook: Any = None


def close_gate_for(gated: Gated) -> None:
    """From now on every optimizer's step first waits for `gated`."""
    global _hook
    with _lock:
        _gated.add(gated)
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_before_step)


def forget(gated: Gated) -> None:
    """Undoes `close_gate_for`."""
    global _hook
    with _lock:
        _gated.discard(gated)
        if not _gated and _hook is not None:
            _hook.remove()
            _hook = None


def _before_step(*_: Any) -> None:
    for gated in list(_gated):
        gated.before_update()
