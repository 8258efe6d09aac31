"""Which membership a process has: its environment says so."""

from __future__ import annotations

import os
from collections.abc import Mapping

from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.elastic.agent.environment import die_with_launcher
from planaria.elastic.membership.client import AgentMembership
from planaria.elastic.membership.fixed import Alone, FixedMembership
from planaria.elastic.membership.view import Membership
from planaria.errors import ConfigError

#: Host and port of the process's agent.
AGENT_ENV = "PLANARIA_ELASTIC"
#: The id that the agent gave the process.
MEMBER_ENV = "PLANARIA_MEMBER"

_RUN_DIR = "PLANARIA_RUN_DIR"
_CONNECT_S = 60.0


def connect(env: Mapping[str, str] | None = None) -> Membership:
    """Finds this process's place in its job.

    Args:
        env: The environment, by default this process's.

    Returns:
        With `PLANARIA_ELASTIC`, that of an agent's member; with more than one rank in torch's
        environment, a fixed one; else that of a process alone.

    Raises:
        ConfigError: The environment is incomplete or malformed.
        WireError: The agent does not answer.
        DeadlineError: It did not in time.
    """
    env = os.environ if env is None else env
    address = env.get(AGENT_ENV)
    if address:
        # Whoever proves an agent dead proves its members dead by that.
        die_with_launcher()
        host, _, port = address.rpartition(":")
        return AgentMembership(
            host.strip("[]"),
            _number(port, AGENT_ENV, address),
            _number(env.get(MEMBER_ENV, ""), MEMBER_ENV, env.get(MEMBER_ENV)),
            token=load_token(env.get(_RUN_DIR)),
            deadline=Deadline(_CONNECT_S),
        )
    world = _number(env.get("WORLD_SIZE", "1"), "WORLD_SIZE", env.get("WORLD_SIZE"))
    if world == 1:
        return Alone()
    try:
        host, port, rank = env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]
    except KeyError as error:
        raise ConfigError(f"WORLD_SIZE is {world}, but {error.args[0]} is not set") from None
    number = _number(rank, "RANK", rank)
    own_store = env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return FixedMembership(
        number,
        world,
        host,
        _number(port, "MASTER_PORT", port),
        hosts_store=own_store and number == 0,
        attempt=_number(env.get("TORCHELASTIC_RESTART_COUNT", "0"), "restart count", None),
    )


def _number(text: str, name: str, shown: str | None) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name} has to hold a number, not {shown!r}")
    return int(text)
