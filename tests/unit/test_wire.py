"""Listening and connecting over real sockets."""

import socket
import struct

import pytest
from wire_pairs import TOKEN, in_thread, soon

from planaria.core.deadline import Deadline
from planaria.core.wire import Listener, connect, listen
from planaria.errors import ConfigError, DeadlineError, PeerClosedError, WireError


def test_a_large_message_over_a_real_socket():
    weights = bytes(range(256)) * (5 << 12)  # 5 MiB: more than sockets buffer
    floats = memoryview(struct.pack("4f", 1, 2, 3, 4)).cast("f", (2, 2))
    with listen(token=TOKEN) as listener:
        answer = in_thread(lambda: echo(listener))
        with connect(*listener.address, token=TOKEN, deadline=soon()) as client:
            client.send({"step": 3}, [weights, floats, memoryview(b"")], deadline=soon())
            message = client.recv(soon())
            assert message.header == {"step": 3}
            assert message.payloads == [
                bytearray(weights),
                bytearray(floats.tobytes()),
                bytearray(),
            ]
        with pytest.raises(PeerClosedError, match="closed the connection"):
            answer.result(60)


def echo(listener: Listener) -> None:
    with listener.accept(soon()) as server:
        while True:
            message = server.recv(soon())
            server.send(message.header, message.payloads, deadline=soon())


def test_a_silent_caller_holds_up_nobody():
    with listen(token=TOKEN) as listener, socket.create_connection(listener.address) as silent:
        answer = in_thread(lambda: [listener.accept(soon()), listener.accept(soon())])
        client = in_thread(lambda: connect(*listener.address, token=TOKEN, deadline=soon()))
        first, second = answer.result(60)
        second.handshake(soon())
        client.result(60).close()
        silent.close()
        with pytest.raises(WireError, match="cut short"):
            first.recv(soon())
        second.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1"])
def test_listening_to_others_needs_a_token(host: str):
    for token in (None, b""):
        with pytest.raises(ConfigError, match=r"refused to listen .*without a token"):
            listen(host, token=token)


def test_listening_to_others_with_a_token_and_to_loopback_without():
    listen("0.0.0.0", token=TOKEN).close()
    listen("127.0.0.1").close()
    listen("localhost").close()


def test_addresses_that_cannot_be_used_are_named(free_port: int):
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", token=TOKEN)
    with pytest.raises(ConfigError, match="not an address that can be used"):
        listen("no host has this name", token=TOKEN)
    with pytest.raises(WireError, match=rf"127\.0\.0\.1:{free_port}: Connection refused"):
        connect("127.0.0.1", free_port, deadline=soon())


def test_accept_has_a_deadline_and_close_ends_it():
    with listen() as listener:
        with pytest.raises(DeadlineError, match=r"a connection to 127\.0\.0\.1"):
            listener.accept(Deadline(0.01))
        waiting = in_thread(lambda: listener.accept(soon()))
        listener.close()
        with pytest.raises(WireError, match="cannot accept"):
            waiting.result(60)
