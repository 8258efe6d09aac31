"""Entropy coding of changes whose positions are conditioned on what the receiver already knows.

The chance that an element changes falls with the step of its number format at its size, so it hangs
on the exponent, and the receiver knows the old exponent of every element. Elements are split into
classes by it; within a class the changes are coded by the number of elements *of that class* that
lie between them, and the values by their ULP distance, with tables of the class.

Both kinds of integers are tokens with extra bits. Tokens are coded by one rANS (range variant of
asymmetric numeral systems; Duda 2013, arXiv:1311.2540) with a state of 32 bits that takes 16 bits
at a time; what the encoder writes last the decoder reads first, so the encoder goes backwards.
Extra bits lie beside it, least significant bit first.
"""

from __future__ import annotations

import numpy as np

from planaria.rl_sync.compiled import kernel

#: Classes of old values: one for zeros and subnormals, the others for exponents, the last but one
#: for all larger ones.
CLASSES = 16
#: Contexts of the tables: gaps of each class, then values of each class.
CONTEXTS = 2 * CLASSES

#: What a decoder found; 0 is a block that decoded.
OK, CUT_SHORT, TOO_MANY, NO_TABLE, NOT_AT_END = range(5)

_LOW = 1 << 16


@kernel
def class_gaps(
    base: np.ndarray,
    pos: np.ndarray,
    lut: np.ndarray,
    ones: np.ndarray,
    shift: int,
    mask: int,
    kind: np.ndarray,
    gap: np.ndarray,
    following: np.ndarray,
    count: np.ndarray,
    first: np.ndarray,
) -> None:
    """Class of each change, elements of the class since its last change, and its next change.

    ``count`` (per class) becomes how many changes a class has, ``first`` its first one or -1.
    ``ones`` is 1 in the byte of an exponent's class, in two words of eight bytes: elements are
    counted in registers, as a counter in memory would wait for its own last store.
    """
    seen = np.zeros(16, np.int64)
    last = np.full(16, -1, np.int64)
    at = 0
    for j in range(pos.size):
        p = np.int64(pos[j])
        while at < p:
            stop = min(p, at + 255)
            low = np.uint64(0)
            high = np.uint64(0)
            for i in range(at, stop):
                e = (base[i] >> shift) & mask
                low += ones[0, e]
                high += ones[1, e]
            for c in range(8):
                seen[c] += np.int64((low >> np.uint64(8 * c)) & np.uint64(255))
                seen[c + 8] += np.int64((high >> np.uint64(8 * c)) & np.uint64(255))
            at = stop
        c = lut[(base[p] >> shift) & mask]
        kind[j] = c
        gap[j] = seen[c]
        seen[c] = 0
        following[j] = -1
        if last[c] >= 0:
            following[last[c]] = j
        else:
            first[c] = j
        last[c] = j
        count[c] += 1
        at = p + 1


@kernel
def order_symbols(
    kind: np.ndarray,
    gap_token: np.ndarray,
    gap_bits: np.ndarray,
    value_token: np.ndarray,
    value_bits: np.ndarray,
    gap: np.ndarray,
    value: np.ndarray,
    following: np.ndarray,
    first: np.ndarray,
    contexts: np.ndarray,
    tokens: np.ndarray,
    extra: np.ndarray,
    extra_bits: np.ndarray,
) -> int:
    """Puts gaps and values in the order in which a decoder needs them; returns their number."""
    n = 0
    for c in range(16):
        j = first[c]
        if j >= 0:
            contexts[n] = c
            tokens[n] = gap_token[j]
            extra[n] = gap[j]
            extra_bits[n] = gap_bits[j]
            n += 1
    for i in range(kind.size):
        contexts[n] = 16 + kind[i]
        tokens[n] = value_token[i]
        extra[n] = value[i]
        extra_bits[n] = value_bits[i]
        n += 1
        j = following[i]
        if j >= 0:
            contexts[n] = kind[i]
            tokens[n] = gap_token[j]
            extra[n] = gap[j]
            extra_bits[n] = gap_bits[j]
            n += 1
    return n


@kernel
def encode_symbols(
    contexts: np.ndarray, tokens: np.ndarray, freq: np.ndarray, start: np.ndarray, words: np.ndarray
) -> tuple[int, int]:
    """Codes tokens into the end of ``words``; returns the final state and where the words begin."""
    x = 65536
    at = words.size
    for k in range(contexts.size - 1, -1, -1):
        f = np.int64(freq[contexts[k], tokens[k]])
        if x >= f << 20:
            at -= 1
            words[at] = x & 0xFFFF
            x >>= 16
        x = ((x // f) << 12) + x % f + start[contexts[k], tokens[k]]
    return x, at  # pyright: ignore[reportReturnType]


@kernel
def pack_bits(extra: np.ndarray, extra_bits: np.ndarray, out: np.ndarray) -> int:
    """Writes the low bits of each value one after the other; returns the number of bits."""
    at = 0
    for k in range(extra.size):
        value = extra[k]
        for b in range(extra_bits[k]):
            if (value >> b) & 1:
                out[at >> 3] |= 1 << (at & 7)
            at += 1
    return at


@kernel
def _integer(context, state, words, bits, freq, start, token, used):
    """Decodes one integer; an error goes to ``state[3]``."""
    if used[context] == 0:
        state[3] = 3
        return 0
    x = state[0]
    slot = x & 0xFFF
    t = np.int64(token[context, slot])
    x = np.int64(freq[context, t]) * (x >> 12) + slot - np.int64(start[context, t])
    if x < 65536:
        if state[1] >= words.size:
            state[3] = 1
            return 0
        x = (x << 16) | np.int64(words[state[1]])
        state[1] += 1
    state[0] = x
    if t < 16:
        return t
    length = 2 + ((t - 16) >> 2)
    at = state[2]
    if at + length > 8 * bits.size:
        state[3] = 1
        return 0
    value = 4 + ((t - 16) & 3)
    value <<= length
    for b in range(length):
        value |= ((np.int64(bits[(at + b) >> 3]) >> ((at + b) & 7)) & 1) << b
    state[2] = at + length
    return value


@kernel
def _place(base, begin, skip, c, lut, shift, mask):
    """Where the element of class ``c`` is that comes after ``skip`` others; there is one."""
    i = begin
    while True:
        if lut[(base[i] >> shift) & mask] == c:
            if skip == 0:
                return i
            skip -= 1
        i += 1


@kernel
def decode_changes(
    base: np.ndarray,
    lut: np.ndarray,
    ones: np.ndarray,
    shift: int,
    mask: int,
    count: np.ndarray,
    state: np.ndarray,
    words: np.ndarray,
    bits: np.ndarray,
    freq: np.ndarray,
    start: np.ndarray,
    token: np.ndarray,
    used: np.ndarray,
    pos: np.ndarray,
    value: np.ndarray,
) -> int:
    """Walks through the old values of a block and finds what changed.

    It counts the classes of 32 elements at a time, and looks for a place among them only where a
    class has more elements there than are to be skipped.

    ``lut[(bits >> shift) & mask]`` is an element's class, and ``ones`` the same, see `class_gaps`;
    ``count`` has the changes of each class, which add up to ``pos.size``. ``state`` is int64 of
    shape (4,): rANS state, next word, next bit, and an error. ``words`` and ``bits`` are the coded
    tokens and extra bits, and what follows is of `Tables`. ``pos`` and ``value`` are filled with
    positions and ULP distances. Returns OK, or what is wrong; nothing outside of the arrays is read
    or written in any case.
    """
    never = 1 << 60
    wait = np.full(16, never, np.int64)
    left = np.zeros(16, np.int64)
    hist = np.zeros(16, np.int64)
    place = np.zeros(16, np.int64)
    for c in range(16):
        left[c] = np.int64(count[c])
        if left[c] > 0:
            wait[c] = _integer(c, state, words, bits, freq, start, token, used)
            if state[3] != 0:
                return state[3]
    n = 0
    total = pos.size
    size = base.size
    begin = 0
    while n < total:
        if begin >= size:
            return 2
        end = min(begin + 32, size)
        low = np.uint64(0)
        high = np.uint64(0)
        for i in range(begin, end):
            e = (base[i] >> shift) & mask
            low += ones[0, e]
            high += ones[1, e]
        due = 0
        for c in range(8):
            hist[c] = np.int64((low >> np.uint64(8 * c)) & np.uint64(255))
            hist[c + 8] = np.int64((high >> np.uint64(8 * c)) & np.uint64(255))
            due |= (hist[c] > wait[c]) | (hist[c + 8] > wait[c + 8])
        if due:
            for c in range(16):
                place[c] = size
                if hist[c] > wait[c]:
                    place[c] = _place(base, begin, wait[c], c, lut, shift, mask)
        while due:
            # The first of the classes' next places; the stream is in the order of places.
            chosen = 0
            for c in range(1, 16):
                if place[c] < place[chosen]:
                    chosen = c
            i = place[chosen]
            if i >= size:
                break
            if n >= total:
                return 2
            z = _integer(16 + chosen, state, words, bits, freq, start, token, used)
            pos[n] = i
            value[n] = z
            n += 1
            left[chosen] -= 1
            place[chosen] = size
            if left[chosen] > 0:
                step = _integer(chosen, state, words, bits, freq, start, token, used)
                wait[chosen] += 1 + step
                if hist[chosen] > wait[chosen]:
                    place[chosen] = _place(base, i + 1, step, chosen, lut, shift, mask)
            else:
                wait[chosen] = never
            if state[3] != 0:
                return state[3]
        for c in range(16):
            wait[c] -= hist[c]
        begin = end
    if state[0] != 65536 or state[1] != words.size or (state[2] + 7) // 8 != bits.size:
        return 4
    return 0
