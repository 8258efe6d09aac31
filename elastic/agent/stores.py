"""The store that members meet on: hosted by an agent, so that no member's death takes it away."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from planaria.errors import ConfigError

_TIMEOUT = timedelta(seconds=300)


def serve_store(host: str = "127.0.0.1") -> tuple[Any, tuple[str, int]]:
    """Serves a `TCPStore` on one address alone: by itself torch's would listen on all of them.

    Torch's store is not authenticated: whoever reaches its port can disturb a job, but not join it.

    Args:
        host: Name or address to listen on.

    Returns:
        The store, which serves as long as it is referred to, and its host and port.

    Raises:
        ConfigError: It cannot listen there.
    """
    from torch.distributed import TCPStore

    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        # At once: until a socket listens, Linux lets a second one bind the same address.
        listener.listen(1024)
    except OSError as error:
        raise ConfigError(f"cannot serve a store on {host}: {error.strerror or error}") from error
    bound, port = listener.getsockname()[:2]
    store = TCPStore(
        bound,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return store, (bound, port)
