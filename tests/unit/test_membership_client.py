"""A member hears that its job is over while it waits for others in a collective."""

import threading
from typing import Any

import pytest

from planaria.elastic.membership.client import AgentMembership
from planaria.elastic.membership.view import View
from planaria.errors import CollectiveError, StoppedError


def member(view: View | None) -> tuple[AgentMembership, list[frozenset[int]]]:
    """A member without a connection."""
    made: Any = AgentMembership.__new__(AgentMembership)
    made.id, made._view, made._failed = 1, view, None
    made._changed, made._closed = threading.Condition(), threading.Event()
    made._gone, made._disturbed, made._wanted = frozenset(), False, None
    heard: list[frozenset[int]] = []
    made._calls = [heard.append]
    return made, heard


def test_who_waits_is_woken_when_the_job_stops():
    found, heard = member(View(2, (0, 1), 1))
    found._hear({"type": "stopped", "reason": "too few"})
    assert heard == [frozenset()]
    assert found.disturbed()
    assert isinstance(found._failed, StoppedError)


@pytest.mark.parametrize("closed", [False, True])
def test_who_waits_is_woken_when_the_agent_is_gone(closed):
    found, heard = member(View(2, (0, 1), 1))
    if closed:
        found._closed.set()
    found._hung_up()
    assert heard == ([] if closed else [frozenset()])
    assert type(found._failed) is CollectiveError


def test_one_that_was_not_admitted_has_nobody_to_wake():
    found, heard = member(None)
    found._hear({"type": "stopped", "reason": "the run is done"})
    assert heard == []
