"""The policies that a configuration, or a command line, describes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planaria.errors import ConfigError

if TYPE_CHECKING:
    from planaria.checkpoint.policies import KeepPolicy, SavePolicy
    from planaria.launch.config import CheckpointConf


def save_policy(conf: "CheckpointConf") -> "SavePolicy | None":
    """When a run saves by itself; None only at its end.

    Raises:
        ConfigError: A value makes no sense; names its key.
    """
    from planaria.checkpoint.policies import Adaptive, AnyOf, Every, EverySeconds, OnSignal

    kinds = {"every": Every, "every_seconds": EverySeconds, "adaptive": Adaptive,
             "on_signal": OnSignal}  # fmt: skip
    made: list[Any] = [
        _make(f"checkpoint.{key}", kind, value)
        for key, kind in kinds.items()
        if (value := getattr(conf, key)) is not None
    ]
    if len(made) < 2:
        return made[0] if made else None
    return AnyOf(*made)


def signal_number(conf: "CheckpointConf") -> int | None:
    """The signal that a run saves on, None where there is none."""
    from planaria.checkpoint.policies import OnSignal

    return None if conf.on_signal is None else OnSignal(conf.on_signal).signal


def keep_policy(conf: "CheckpointConf") -> "KeepPolicy | None":
    """What a run keeps; None for everything.

    Raises:
        ConfigError: A value makes no sense; names its key.
    """
    try:
        return make_keep_policy(
            conf.keep, conf.keep_every, conf.keep_best, conf.keep_best_count, conf.keep_best_mode
        )
    except ConfigError as error:
        raise ConfigError(f"checkpoint.keep...: {error}") from error


def make_keep_policy(
    last: int | None, every: int | None, best: str | None, best_count: int, best_mode: str
) -> "KeepPolicy | None":
    """The union of what is given.

    Args:
        last: How many of the newest steps to keep.
        every: Keep multiples of this.
        best: Name of a metric.
        best_count: How many of the best by it.
        best_mode: ``"min"`` or ``"max"``.

    Raises:
        ConfigError: A value makes no sense.
    """
    from planaria.checkpoint.policies import KeepAny, KeepBest, KeepEvery, KeepLast

    made: list[Any] = []
    if last is not None:
        made.append(KeepLast(last))
    if every is not None:
        made.append(KeepEvery(every))
    if best is not None:
        made.append(KeepBest(best, best_count, best_mode))  # type: ignore[arg-type]
    if len(made) < 2:
        return made[0] if made else None
    return KeepAny(*made)


def _make(key: str, kind: Callable[[Any], Any], value: Any) -> Any:
    try:
        return kind(value)
    except ConfigError as error:
        raise ConfigError(f"{key}={value!r}: {error}") from error
