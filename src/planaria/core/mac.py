"""Authentication of bulk data: GMAC, which runs near the speed of memory.

GMAC is AES-GCM with nothing to encrypt. Where the processor has instructions for AES and carry-less
products it takes a quarter to a fifth of the time of HMAC-SHA256, and it lets other threads run
meanwhile. It needs what HMAC does not: **no two messages under one key may have the same number.**
"""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

#: Length of a key (AES-256).
KEY_NBYTES = 32
#: Length of a tag.
TAG_NBYTES = 16
_NONCE_NBYTES = 12


class Gmac:
    """The tag of one message, whose bytes are added as they come."""

    def __init__(self, key: bytes, number: int) -> None:
        """Begins with an empty message.

        Args:
            key: 32 bytes that serve no other purpose.
            number: Of the message; never used before with this key, 0 to 2**96 - 1.
        """
        nonce = number.to_bytes(_NONCE_NBYTES, "big")
        self._context = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()

    def update(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Adds contiguous bytes."""
        self._context.authenticate_additional_data(data)

    def digest(self) -> bytes:
        """The tag, 16 bytes; nothing can be added afterwards."""
        self._context.finalize()
        return self._context.tag
