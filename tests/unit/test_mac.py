"""GMAC: the tags are those of AES-GCM, whatever pieces the bytes come in."""

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from planaria.core.mac import KEY_NBYTES, TAG_NBYTES, Gmac

KEY = bytes(range(KEY_NBYTES))


@given(pieces=st.lists(st.binary(max_size=100), max_size=5), number=st.integers(0, 2**64))
def test_the_tag_is_that_of_aes_gcm_without_a_text(pieces: list[bytes], number: int):
    mac = Gmac(KEY, number)
    for piece in pieces:
        mac.update(piece)
    tag = mac.digest()
    assert len(tag) == TAG_NBYTES
    nonce = number.to_bytes(12, "big")
    AESGCM(KEY).decrypt(nonce, tag, b"".join(pieces))  # raises if it is another
    with pytest.raises(InvalidTag):
        AESGCM(KEY).decrypt(nonce, tag, b"".join(pieces) + b"x")


def test_equal_messages_of_different_numbers_have_different_tags():
    tags = set()
    for number in range(100):
        mac = Gmac(KEY, number)
        mac.update(b"the same")
        tags.add(mac.digest())
    assert len(tags) == 100
