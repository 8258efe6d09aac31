"""Authenticating much data: what a message's payloads add to its HMAC.

HMAC-SHA256 runs at a fraction of the speed of memory, also where the processor has instructions for
it. Where both sides have the `cryptography` package, long payloads are therefore hashed with GMAC
(AES-256 in GCM with associated data alone; NIST SP 800-38D), several times as fast, under a key of
their own and with the message's number as the nonce. Its tag is not sent: it is put into the
message's HMAC in place of the payloads, so it needs no trust beyond that nobody without the key can
find two payloads with one tag.
"""

from __future__ import annotations

import functools
from typing import Any

from planaria.core.byte_stream import Buffer

#: Payloads of fewer bytes are put into the HMAC themselves.
LEAST_BYTES = 64 << 10
_NONCE = 12


class Gmac:
    """GMAC of a stream of bytes."""

    def __init__(self, key: bytes, number: int) -> None:
        """Begins one.

        Args:
            key: 32 bytes that are used for nothing else.
            number: Of the message; used once with this key.
        """
        cipher, aes, gcm = _library()
        nonce = number.to_bytes(_NONCE, "big")
        self._cipher = cipher(aes(key), gcm(nonce)).encryptor()

    def update(self, data: Buffer, /) -> None:
        """Adds bytes."""
        self._cipher.authenticate_additional_data(data)

    def digest(self) -> bytes:
        """The tag, 16 bytes; nothing can be added afterwards."""
        self._cipher.finalize()
        return self._cipher.tag


@functools.cache
def available() -> bool:
    """Whether this process has what it takes."""
    try:
        Gmac(bytes(32), 0)
    except Exception:  # not installed, or its OpenSSL without AES: HMAC does for all
        return False
    return True


@functools.cache
def _library() -> tuple[Any, Any, Any]:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher, algorithms.AES, modes.GCM
