"""What was changed, cut, repeated, reordered, recorded or sent without the token is refused."""

import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_pairs import TOKEN, Pair, in_thread, joined, pair, soon

from planaria.core import connection
from planaria.core.connection import Message
from planaria.errors import PeerClosedError, WireError

HANDSHAKE_BYTES = 16 + 32 + 32  # what a side sends before its first message


def flipped(position: int, mask: int) -> list[Message]:
    """Sends two messages with one byte of the client's stream flipped on the way.

    Raises what either side raises; returns what the server got otherwise.
    """
    with pair() as p:
        seen = 0

        def forge(data: bytes) -> list[bytes]:
            nonlocal seen
            changed = bytearray(data)
            if 0 <= position - seen < len(data):
                changed[position - seen] ^= mask
            seen += len(data)
            return [bytes(changed)]

        def send() -> None:
            p.client.send({"step": 1}, [b"weights", b""], deadline=soon())
            p.client.send({"step": 2}, [b"more"], deadline=soon())

        def carry(upstream: bool) -> None:
            try:
                while p.carry(upstream, forge if upstream else lambda b: [b]):
                    pass
            except OSError:
                pass  # a side has closed
            finally:
                for end in (p.from_client, p.from_server):
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)  # unlike close(), it wakes who waits there

        sender = in_thread(send)
        carriers = [in_thread(lambda: carry(True)), in_thread(lambda: carry(False))]
        received = []
        try:
            try:
                received = [p.server.recv(soon()), p.server.recv(soon())]
            finally:
                sender.result(60)
        finally:
            p.client.close()
            p.server.close()
            for carrier in carriers:
                carrier.result(60)
        return received


def every_flip_is_refused(positions: range) -> None:
    for position in positions:
        with pytest.raises(WireError):
            flipped(position, 1 << position % 8)


STREAM_BYTES = (
    HANDSHAKE_BYTES + 2 * (24 + 32 + 16) + 3 * 8 + 2 * len('{"step":1}') + len("weightsmore")
)


def test_the_stream_is_as_long_as_these_tests_think():
    assert [m.header for m in flipped(STREAM_BYTES, 255)] == [{"step": 1}, {"step": 2}]
    every_flip_is_refused(range(STREAM_BYTES - 1, STREAM_BYTES))


def test_any_flipped_byte_is_refused():
    every_flip_is_refused(range(STREAM_BYTES))


def test_an_hmac_that_is_not_checked_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "_same", lambda got, wanted: True)
    first_payload = HANDSHAKE_BYTES + 24 + 32 + 2 * 8 + len('{"step":1}')
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        every_flip_is_refused(range(first_payload, first_payload + 1))


@given(size=st.integers(1, 24 + 32 + 8 + 2 + 5 + 16 - 1))
def test_any_cut_is_refused(size: int):
    with pair() as p:
        p.shake()
        p.client.send({}, [b"bytes"], deadline=soon())
        p.carry(True, lambda data: [data[:size]])
        p.from_server.close()
        with pytest.raises(WireError, match=r"cut short|Connection reset") as caught:
            p.server.recv(soon())
        assert not isinstance(caught.value, PeerClosedError)


def frames(p: Pair, number: int, upstream: bool = True) -> list[bytes]:
    """The bytes of so many messages, caught on the way."""
    caught = []
    for i in range(number):
        (p.client if upstream else p.server).send({"n": i}, deadline=soon())
        caught.append(p.carry(upstream, lambda _: []))
    return caught


def test_a_repeated_message_is_refused():
    with pair() as p:
        p.shake()
        (frame,) = frames(p, 1)
        p.from_server.sendall(frame + frame)
        assert p.server.recv(soon()).header == {"n": 0}
        with pytest.raises(WireError, match="repeated or out of order: number 0 where 1 is due"):
            p.server.recv(soon())


def test_a_receiver_that_does_not_count_would_accept_it():
    with pair() as p:
        p.shake()
        (frame,) = frames(p, 1)
        p.from_server.sendall(frame + frame)
        p.server.recv(soon())
        p.server._received = 0
        assert p.server.recv(soon()).header == {"n": 0}  # so the test above tests the counting


def test_reordered_and_dropped_messages_are_refused():
    for order in [(1, 0), (1,)]:
        with pair() as p:
            p.shake()
            caught = frames(p, 2)
            p.from_server.sendall(b"".join(caught[i] for i in order))
            with pytest.raises(WireError, match="number 1 where 0 is due"):
                p.server.recv(soon())


def test_messages_of_another_connection_are_refused():
    with pair() as earlier, pair() as p:
        earlier.shake()
        p.shake()
        p.from_server.sendall(frames(earlier, 1)[0])
        with pytest.raises(WireError, match="not authentic"):
            p.server.recv(soon())


def test_a_message_sent_back_to_its_sender_is_refused():
    with pair() as p:
        p.shake()
        p.from_client.sendall(frames(p, 1)[0])
        with pytest.raises(WireError, match="not authentic"):
            p.client.recv(soon())


def test_a_recorded_handshake_is_refused():
    with pair() as earlier, pair() as p:
        in_thread(lambda: earlier.client.handshake(soon()))
        in_thread(lambda: earlier.server.handshake(soon()))
        hello = earlier.carry(True)
        earlier.carry_exactly(False, 80)
        proof = earlier.carry(True)
        p.from_server.sendall(hello + proof)
        with pytest.raises(WireError, match="does not hold this job's token"):
            p.server.recv(soon())


@pytest.mark.parametrize(
    ("client", "server"), [(b"x" * 32, TOKEN), (None, TOKEN), (TOKEN, None), (TOKEN, TOKEN + b"x")]
)
def test_another_token_is_refused_on_both_sides(client: bytes | None, server: bytes | None):
    with joined(client, server) as p:
        answer = in_thread(lambda: p.server.recv(soon()))
        with pytest.raises(WireError, match="server does not hold this job's token"):
            p.client.send({"stop": True}, deadline=soon())
        with pytest.raises(WireError, match="may hold another PLANARIA_TOKEN"):
            answer.result(60)


def test_without_tokens_both_sides_still_understand_each_other():
    with joined(None, None) as p:
        answer = in_thread(lambda: p.server.recv(soon()))
        p.client.send({"a": 1}, deadline=soon())
        assert answer.result(60).header == {"a": 1}


def test_another_protocol_is_refused():
    with pair() as p:
        p.from_server.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n")
        with pytest.raises(WireError, match=r"does not speak this protocol.*GET / HTTP/1\.1"):
            p.server.recv(soon())
