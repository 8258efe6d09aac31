"""Messages that arrive, those that are refused by their sender, and waits that end."""

import math
import struct
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_pairs import in_thread, joined, pair, soon

from planaria.core import connection
from planaria.core.connection import Connection, Limits, Message
from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError, PeerClosedError, WireError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.tuples(
        st.dictionaries(st.text(max_size=5), JSON, max_size=3),
        st.lists(st.binary(max_size=200), max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def up_within_a_message(connection: Connection) -> Deadline:
    """A deadline that is not up before something has come, and soon after that."""
    began: list[float] = []
    read_some = connection._stream.read_some

    def note(*args: Any) -> int:
        got = read_some(*args)
        began.append(time.monotonic())
        return got

    connection._stream.read_some = note  # type: ignore[method-assign]
    return Deadline(60, clock=lambda: 59.95 + time.monotonic() - began[0] if began else 0.0)


@given(messages=MESSAGES, places=st.lists(st.floats(0, 1), max_size=8).map(sorted))
def test_any_split_of_the_stream_gives_the_same_messages(messages, places):
    def split(stream: bytes) -> list[bytes]:
        cuts = [round(place * len(stream)) for place in places]
        return [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    with pair() as p:
        p.shake()
        for header, payloads in messages:
            p.client.send(header, payloads, deadline=soon())
        carrier = in_thread(lambda: p.carry(True, split))
        for header, payloads in messages:
            assert p.server.recv(soon()) == Message(header, [bytearray(b) for b in payloads])
        carrier.result(60)


def test_both_directions_and_many_threads_at_once():
    with joined() as p:

        def talk(me: Connection, name: str) -> None:
            for i in range(20):
                me.send({"from": name, "i": i}, [bytes([i]) * 1000], deadline=soon())

        def hear(me: Connection) -> list[Message]:
            return [me.recv(soon()) for _ in range(60)]

        sides = (p.client, p.server)
        heard = [in_thread(lambda me=me: hear(me)) for me in sides]
        talking = [in_thread(lambda me=me, t=t: talk(me, t)) for me in sides for t in "abc"]
        for each in talking:
            each.result(60)
        for each in heard:
            messages = each.result(60)
            assert all(m.payloads == [bytes([m.header["i"]]) * 1000] for m in messages)
            for name in "abc":
                assert [m.header["i"] for m in messages if m.header["from"] == name] == [*range(20)]


def test_oversized_messages_are_refused_before_anything_is_sent_or_allocated():
    small = Limits(header_bytes=100, payload_bytes=1000, payloads=3)
    cases = [
        ({"x": "y" * 200}, [], "bytes of header, the limit is 100"),
        ({}, [b"x" * 1001], "1001 bytes of payload, the limit is 1000"),
        ({}, [b""] * 4, "4 payloads, the limit is 3"),
    ]
    for header, payloads, why in cases:
        with pair(limits=small) as p:
            p.shake()
            with pytest.raises(WireError, match=rf"to client is oversized: .*{why}"):
                p.server.send(header, payloads, deadline=soon())
            p.server.send({"still": "usable"}, deadline=soon())
            p.carry(False)
            assert p.client.recv(soon()).header == {"still": "usable"}
            p.client.send(header, payloads, deadline=soon())  # whose own limits are larger
            # Only the sizes go over, so nothing waits for the rest.
            p.carry(True, lambda data: [data[: 24 + 32]])
            with pytest.raises(WireError, match=rf"from client is oversized: .*{why}"):
                p.server.recv(soon())


@pytest.mark.parametrize("header", [{"a": object()}, {"a": math.nan}, {(1,): 2}])
def test_a_header_beyond_json_is_refused(header):
    with joined() as p, pytest.raises(WireError, match="header is not JSON"):
        p.client.send(header, deadline=soon())


def test_a_payload_with_holes_is_refused():
    with joined() as p, pytest.raises(WireError, match="not a contiguous buffer"):
        p.client.send({}, [memoryview(b"abcdef")[::2]], deadline=soon())


@pytest.mark.parametrize(
    "header", [b"", b"[1]", b"{", b'"x"', b"\xff\xfe", b'{"a":' * 100_000, b"null"]
)
def test_an_authentic_header_that_is_no_object_is_refused(header, monkeypatch):
    with joined() as p:
        monkeypatch.setattr(connection, "_encode_header", lambda _: header)
        answer = in_thread(lambda: p.server.recv(soon()))
        p.client.send({}, deadline=soon())
        with pytest.raises(WireError, match="message from client is malformed: its header"):
            answer.result(60)


def test_payload_sizes_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pair() as p:
        p.shake()
        # The module's alone: other threads of this process pack, too.
        wrong = SimpleNamespace(
            pack=lambda f, *sizes: struct.pack(f, *(i + 1 for i in sizes)), unpack=struct.unpack
        )
        monkeypatch.setattr(connection, "struct", wrong)
        p.client.send({}, [b"x"], deadline=soon())
        p.carry(True)
        with pytest.raises(WireError, match="sizes do not add up"):
            p.server.recv(soon())


def test_waiting_for_a_message_may_be_repeated_but_not_within_one():
    with pair() as p:
        p.shake()
        with pytest.raises(DeadlineError, match="waiting for a message from client"):
            p.server.recv(Deadline(0.01))
        p.client.send({"late": True}, deadline=soon())
        p.carry(True)
        assert p.server.recv(soon()).header == {"late": True}

        p.client.send({"half": True}, deadline=soon())
        p.carry(True, lambda data: [data[:40]])
        with pytest.raises(DeadlineError):
            p.server.recv(up_within_a_message(p.server))
        with pytest.raises(WireError, match="cannot be used: gave up waiting"):
            p.server.recv(soon())
        with pytest.raises(WireError, match="cannot be used"):
            p.server.send({}, deadline=soon())


def test_sending_to_a_peer_that_does_not_read_has_a_deadline():
    with pair() as p:
        p.shake()
        with pytest.raises(DeadlineError, match="waiting for server to take a message"):
            p.client.send({}, [b"x" * (32 << 20)], deadline=Deadline(0.2))
        with pytest.raises(WireError, match="cannot be used"):
            p.client.send({}, deadline=soon())


def test_the_handshake_has_a_deadline():
    with pair() as p, pytest.raises(DeadlineError, match="the handshake with client"):
        p.server.recv(Deadline(0.05))


def test_close_ends_a_wait_in_another_thread():
    with pair() as p:
        p.shake()
        waiting = in_thread(lambda: p.server.recv(soon()))
        p.server.close()
        with pytest.raises(WireError, match=r"closed on this side|cannot be used") as caught:
            waiting.result(60)
        assert not isinstance(caught.value, PeerClosedError)


def test_payloads_go_where_the_receiver_says_if_they_fit():
    room = [memoryview(bytearray(8)), memoryview(bytearray(2)), memoryview(bytearray(4))]
    with pair() as p:
        p.shake()
        p.client.send({}, [b"12345678", b"abc", b"", b"more"], deadline=soon())
        p.carry(True)
        got = p.server.recv(soon(), room)
        assert [bytes(each) for each in got.payloads] == [b"12345678", b"abc", b"", b"more"]
        assert bytes(room[0]) == b"12345678"
        assert bytes(room[1]) == bytes(2)  # too small: it was not touched
        assert isinstance(got.payloads[1], bytearray)


def test_a_payload_that_was_changed_on_the_way_into_a_buffer_is_refused():
    with pair() as p:
        p.shake()
        p.client.send({}, [b"12345678"], deadline=soon())
        p.carry(True, lambda data: [data.replace(b"12345678", b"12345679")])
        with pytest.raises(WireError, match="not authentic"):
            p.server.recv(soon(), [memoryview(bytearray(8))])


def test_no_number_is_used_twice(monkeypatch: pytest.MonkeyPatch):
    used: list[tuple[bytes, int]] = []

    class Watched(connection.Gmac):
        def __init__(self, key: bytes, number: int) -> None:
            used.append((key, number))
            super().__init__(key, number)

    monkeypatch.setattr(connection, "Gmac", Watched)
    with pair() as p:
        p.shake()
        for upstream in (True, False, True):
            (p.client if upstream else p.server).send({}, deadline=soon())
            p.carry(upstream, lambda data: [data])
        assert len(set(used)) == len(used) == 3
