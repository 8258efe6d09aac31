"""Figures for files, by matplotlib, which is an extra and is imported where something is drawn."""

from pathlib import Path
from typing import Any

from planaria.errors import ConfigError, NotSupportedError


def figure(height: float) -> Any:
    """An empty figure, ten inches wide.

    Args:
        height: In inches.

    Raises:
        NotSupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotSupportedError(
            "drawing needs matplotlib, which is not installed: pip install 'planaria[bench]'"
        ) from error
    return Figure(figsize=(10, height), layout="tight")


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
