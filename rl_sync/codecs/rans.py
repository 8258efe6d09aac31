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

# Counters of the classes side by side in a word: 16 of four bits, or the even and the odd classes
# in eight bytes each. Unsigned throughout: numba makes a float of a mixture.
_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_TOPS = np.uint64(0x8080808080808080)
_BYTE = np.uint64(0xFF)
_FOUR = np.uint64(4)
_ONE = np.uint64(1)
#: Elements that four bits can count.
_RUN = 15
#: The longest wait that a byte holds beside its top bit.
_WAIT = 127
_NEVER = 1 << 60


@kernel
def _lane(c):
    """Where the byte of class ``c`` is in its word."""
    return np.uint64(c >> 1) << np.uint64(3)


@kernel
def class_gaps(
    base: np.ndarray,
    pos: np.ndarray,
    lut: np.ndarray,
    ones: np.ndarray,
    shift: np.uint64,
    mask: np.uint64,
    kind: np.ndarray,
    gap: np.ndarray,
    following: np.ndarray,
    count: np.ndarray,
    first: np.ndarray,
) -> None:
    """Class of each change, elements of the class since its last change, and its next change.

    ``count`` (per class) becomes how many changes a class has, ``first`` its first one or -1.
    ``ones`` is a 1 in the four bits of an exponent's class: elements are counted in registers, as
    a counter in memory would wait for its own last store.
    """
    seen = np.zeros(16, np.int64)  # elements of a class, without those that the bytes count
    next_to = np.zeros(16, np.int64)  # elements of a class up to its last change, with it
    last = np.full(16, -1, np.int64)
    even, odd = np.uint64(0), np.uint64(0)
    held = 0
    at = 0
    for j in range(pos.size):
        p = np.int64(pos[j])
        while True:
            if held > 255 - _RUN - 1:
                for c in range(0, 16, 2):
                    seen[c] += np.int64((even >> _lane(c)) & _BYTE)
                    seen[c + 1] += np.int64((odd >> _lane(c)) & _BYTE)
                even, odd = np.uint64(0), np.uint64(0)
                held = 0
            if at >= p:
                break
            stop = min(p, at + _RUN)
            part = base[at:stop]  # counted from 0: numba looks whether an index is negative
            run = np.uint64(0)
            for i in range(stop - at):
                run += ones[(np.uint64(part[i]) >> shift) & mask]
            even += run & _NIBBLES
            odd += (run >> _FOUR) & _NIBBLES
            held += stop - at
            at = stop
        e = (np.uint64(base[p]) >> shift) & mask
        c = np.int64(lut[e])
        word = odd if c & 1 else even
        total = seen[c] + np.int64((word >> _lane(c)) & _BYTE)
        even += ones[e] & _NIBBLES
        odd += (ones[e] >> _FOUR) & _NIBBLES
        held += 1
        at = p + 1
        kind[j] = c
        gap[j] = total - next_to[c]
        next_to[c] = total + 1
        following[j] = -1
        if last[c] >= 0:
            following[last[c]] = j
        else:
            first[c] = j
        last[c] = j
        count[c] += 1


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
        length = np.int64(extra_bits[k])
        if length == 0:
            continue
        value = (np.int64(extra[k]) & ((1 << length) - 1)) << (at & 7)
        byte = at >> 3
        while value:
            out[byte] |= value & 0xFF
            value >>= 8
            byte += 1
        at += length
    return at  # pyright: ignore[reportReturnType]


@kernel
def _integer(context, x, word, bit, words, bits, freq, start, token):
    """Decodes one integer: it, rANS state, next word and next bit; -1 if the data ends before it.

    A context without a table is not to be asked for.
    """
    slot = x & 0xFFF
    t = np.int64(token[context, slot])
    x = np.int64(freq[context, t]) * (x >> 12) + slot - np.int64(start[context, t])
    if x < 65536:
        if word >= words.size:
            return -1, x, word, bit
        x = (x << 16) | np.int64(words[word])
        word += 1
    if t < 16:
        return t, x, word, bit
    length = 2 + ((t - 16) >> 2)
    if bit + length > 8 * bits.size:
        return -1, x, word, bit
    got = 0
    byte = bit >> 3
    for k in range((length + (bit & 7) + 7) >> 3):
        got |= np.int64(bits[byte + k]) << (8 * k)
    got = (got >> (bit & 7)) & ((1 << length) - 1)
    return ((4 + ((t - 16) & 3)) << length) | got, x, word, bit + length


@kernel
def _filled(word, then, rest, first):
    """Every other class from ``first``: gives the bytes that run out what their waits have left."""
    due = ~then & _TOPS
    c = first
    while due != 0:
        if due & _BYTE != 0 and rest[c] > 0:
            held = min(rest[c], _WAIT - _RUN)
            rest[c] -= held
            word += np.uint64(held) << _lane(c)
        due >>= np.uint64(8)
        c += 2
    return word


@kernel
def decode_changes(
    base: np.ndarray,
    lut: np.ndarray,
    ones: np.ndarray,
    shift: np.uint64,
    mask: np.uint64,
    count: np.ndarray,
    state: int,
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

    How many elements of each class are to be passed over until its next change stands in a byte,
    below a top bit that is set: eight classes in a word. Elements are counted a run at a time
    and taken off; where that clears a top bit there is a change among them (or the byte held less
    than the wait), and they are gone through one by one.

    ``lut[(bits >> shift) & mask]`` is an element's class, and ``ones`` the same, see `class_gaps`;
    ``count`` has the changes of each class, which add up to ``pos.size``. ``state`` is the rANS
    state, ``words`` and ``bits`` are the coded tokens and extra bits, and what follows is of
    `Tables`. ``pos`` and ``value`` are filled with positions and ULP distances. Returns OK, or what
    is wrong; nothing outside of the arrays is read or written in any case.
    """
    rest = np.zeros(16, np.int64)  # of a wait, what its byte does not hold
    left = np.zeros(16, np.int64)  # changes of a class
    even, odd = _TOPS, _TOPS
    x, word, bit = state, 0, 0
    for c in range(16):
        left[c] = np.int64(count[c])
        rest[c] = _NEVER
        if left[c] > 0:
            if used[c] == 0 or used[16 + c] == 0:
                return 3
            rest[c], x, word, bit = _integer(c, x, word, bit, words, bits, freq, start, token)
            if rest[c] < 0:
                return 1
        held = min(rest[c], _WAIT)
        rest[c] -= held
        if c & 1:
            odd |= np.uint64(held) << _lane(c)
        else:
            even |= np.uint64(held) << _lane(c)
    n = 0
    total = pos.size
    size = base.size
    begin = 0
    while n < total:
        if begin >= size:
            return 2
        end = begin + 2 * _RUN
        if end <= size:
            part = base[begin:end]  # counted from 0: numba looks whether an index is negative
            run = np.uint64(0)
            more = np.uint64(0)
            for i in range(_RUN):
                run += ones[(np.uint64(part[i]) >> shift) & mask]
                more += ones[(np.uint64(part[i + _RUN]) >> shift) & mask]
            even_run = even - (run & _NIBBLES)
            odd_run = odd - ((run >> _FOUR) & _NIBBLES)
            end = begin + _RUN
            if (even_run & odd_run & _TOPS) == _TOPS:
                even, odd = even_run, odd_run
                begin, end = end, end + _RUN
                even_run = even - (more & _NIBBLES)
                odd_run = odd - ((more >> _FOUR) & _NIBBLES)
                if (even_run & odd_run & _TOPS) == _TOPS:
                    even, odd = even_run, odd_run
                    begin = end
                    continue
            before = even, odd
            even, odd = _filled(even, even_run, rest, 0), _filled(odd, odd_run, rest, 1)
            if before != (even, odd):
                continue
        else:
            end = min(begin + _RUN, size)
        part = base[begin:end]
        for i in range(end - begin):
            e = (np.uint64(part[i]) >> shift) & mask
            even -= ones[e] & _NIBBLES
            odd -= (ones[e] >> _FOUR) & _NIBBLES
            if (even & odd & _TOPS) == _TOPS:
                continue
            c = np.int64(lut[e])
            if rest[c] > 0:
                wait = rest[c] - 1
            else:
                if n >= total:
                    return 2
                z, x, word, bit = _integer(16 + c, x, word, bit, words, bits, freq, start, token)
                if z < 0:
                    return 1
                pos[n] = begin + i
                value[n] = z
                n += 1
                left[c] -= 1
                wait = _NEVER
                if left[c] > 0:
                    wait, x, word, bit = _integer(c, x, word, bit, words, bits, freq, start, token)
                    if wait < 0:
                        return 1
            held = min(wait, _WAIT)
            rest[c] = wait - held
            # The byte went from 128 to 127: what it should be is more by this.
            if c & 1:
                odd += np.uint64(held + 1) << _lane(c)
            else:
                even += np.uint64(held + 1) << _lane(c)
            end = begin + i + 1
            break
        begin = end
    if x != 65536 or word != words.size or (bit + 7) // 8 != bits.size:
        return 4
    return 0
