"""Which node this process is on."""

import os
import socket

#: Label of this process's node, where it is not the host.
NODE_ENV = "PLANARIA_NODE"


def node_name() -> str:
    """The label of this process's node: ``PLANARIA_NODE``, else the host's name."""
    return os.environ.get(NODE_ENV) or socket.gethostname()
