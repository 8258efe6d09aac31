"""All codecs by name."""

from __future__ import annotations

from planaria.errors import FormatError
from planaria.rl_sync.codecs.base import Codec
from planaria.rl_sync.codecs.exponent import ExponentCodec
from planaria.rl_sync.codecs.gaps import GapRawCodec, GapUlpCodec
from planaria.rl_sync.codecs.plain import BitmapCodec, DenseCodec

NAMES = ("dense", "bitmap", "gap_raw", "gap_ulp", "exponent")


def all_codecs() -> dict[str, Codec]:
    """New objects of every codec; what they learn from one publisher's weights stays with it."""
    made: list[Codec] = [
        DenseCodec(), BitmapCodec(), GapRawCodec(), GapUlpCodec(), ExponentCodec()
    ]  # fmt: skip
    return {codec.name: codec for codec in made}


_decoders = all_codecs()


def decoder(name: str) -> Codec:
    """The codec of this name, for decoding.

    Raises:
        FormatError: This version does not know it.
    """
    if name not in _decoders:
        raise FormatError(
            f"a weight version is coded by {name!r}, which this version of Planaria does not "
            f"know (it knows {', '.join(NAMES)}); use a newer one on the rollout's side"
        )
    return _decoders[name]
