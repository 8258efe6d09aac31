"""Systematic erasure codes over GF(2^8): k data rows, m parity rows, any m of them may be lost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.checkpoint.erasure.codec import Codec
    from planaria.checkpoint.erasure.registry import available_backends, make_codec

_EXPORTS = {"Codec": "codec", "available_backends": "registry", "make_codec": "registry"}
__all__ = ["Codec", "available_backends", "make_codec"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
