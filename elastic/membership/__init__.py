"""Who takes part, generation after generation.

In reading order: `view` (what a member sees), `quorum` (which side may go on), `decision` (what
becomes of what members say, without any I/O), `watching` (who hangs, who is slow), `links`
(messages between processes), `coordinator` (carries decisions out), `desk` (the members of one
agent), `client` (a member's own end), `fixed` (jobs without an agent), `connecting`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.membership.client import AgentMembership
    from planaria.elastic.membership.connecting import connect
    from planaria.elastic.membership.fixed import Alone, FixedMembership
    from planaria.elastic.membership.view import Membership, Standing, View

_EXPORTS = {
    "AgentMembership": "client",
    "Alone": "fixed",
    "FixedMembership": "fixed",
    "Membership": "view",
    "Standing": "view",
    "View": "view",
    "connect": "connecting",
}
__all__ = [
    "AgentMembership",
    "Alone",
    "FixedMembership",
    "Membership",
    "Standing",
    "View",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
