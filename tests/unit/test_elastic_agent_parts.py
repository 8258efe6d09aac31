"""Parts of the agent: what of torch it leans on, who takes over, what a lost agent proves."""

import inspect
import os
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SubprocessContext

from planaria.core.deadline import Deadline
from planaria.core.procs import identity, start
from planaria.elastic.agent import roster
from planaria.elastic.agent.agent import ElasticAgent
from planaria.elastic.agent.job import Job
from planaria.elastic.agent.roster import Entry, Pledge, newest, order, proven_dead, takeover
from planaria.elastic.membership.rules import Rules
from planaria.elastic.membership.view import View
from planaria.errors import WireError

PRIVATE = ("_invoke_run", "_start_workers", "_monitor_workers", "_shutdown", "_exit_barrier")


@pytest.mark.parametrize("name", [*PRIVATE, "_stop_workers", "_set_local_rank_env"])
def test_torch_still_has_what_is_overridden_or_used(name: str) -> None:
    """Private names: a new torch may drop them, and this agent would restart everybody then."""
    theirs = getattr(LocalElasticAgent, name)
    ours = getattr(ElasticAgent, name)
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


def test_torch_calls_what_is_overridden() -> None:
    assert "self._invoke_run(role)" in inspect.getsource(api.SimpleElasticAgent.run)
    assert "self._shutdown(" in inspect.getsource(api.SimpleElasticAgent.run)
    for name in PRIVATE:
        assert name in ElasticAgent.__dict__
    assert "subprocess_handlers" in inspect.getsource(SubprocessContext.__init__)


def pledge(name: str, *members: int, term: int = 1, view: View | None = None,
           seen: int = 1, dead: tuple[int, ...] = ()) -> Pledge:  # fmt: skip
    accepted = None if view is None else (seen, view)
    return Pledge(name, frozenset(members), term, accepted, frozenset(dead))


OLD = View(3, (0, 1, 2, 3), 0)


def test_a_majority_takes_over() -> None:
    found = takeover([pledge("b", 1, view=OLD), pledge("c", 2, 3, view=OLD)], (), 10, {"a": 1})
    assert found is not None
    term, past = found
    assert (term, past.generation, past.members, past.facts) == (2, 3, (0, 1, 2, 3), {"a": 1})
    assert past.next_id > 10


def test_half_does_not_unless_the_others_are_dead() -> None:
    assert takeover([pledge("c", 2, 3, view=OLD)], (), 10, None) is None
    assert takeover([pledge("c", 2, 3, view=OLD)], (0, 1), 10, None) is not None
    assert takeover([pledge("c", 2, 3, view=OLD, dead=(0,))], (), 10, None) is not None
    assert takeover([pledge("c", 2, 3)], (0, 1), 10, None) is None  # it knows no generation


def test_the_newest_generation_that_anybody_remembers_counts() -> None:
    """The others may have gone on, with one that is here, before that lost them."""
    later = View(4, (0, 1, 2), 0)
    assert takeover([pledge("b", 1, view=OLD), pledge("c", 2, 3, view=OLD)], (), 9, None)
    both = [pledge("b", 1, view=OLD), pledge("c", 2, view=later), pledge("d", 3, view=OLD)]
    found = takeover(both, (), 9, None)
    assert found is not None
    assert found[1].members == (0, 1, 2)
    assert takeover([both[1], both[2]], (), 9, None) is None
    rival = replace(later, members=(1, 2, 3))
    assert newest([pledge("b", view=later, seen=1), pledge("c", view=rival, seen=2)]) == rival


@given(st.data())
def test_two_disjoint_sides_never_both_take_over(data: st.DataObject) -> None:
    members = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True))
    view = View(1, tuple(sorted(members)), members[0])
    places = {m: data.draw(st.integers(0, 2)) for m in members}
    dead = tuple(m for m, place in places.items() if place == 2)
    known = st.sets(st.sampled_from(dead)) if dead else st.just(set[int]())
    went_on = 0
    for side in (0, 1):
        here = [m for m, place in places.items() if place == side]
        pledges = [pledge(f"agent {m}", m, view=view) for m in here]
        went_on += bool(here) and takeover(pledges, data.draw(known), 0, None) is not None
    assert went_on <= 1


def test_an_ignored_quorum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "has_quorum", lambda *_: True)
    with pytest.raises(AssertionError):
        test_half_does_not_unless_the_others_are_dead()


def test_agents_are_turned_to_by_their_members() -> None:
    def entry(*members: int) -> Entry:
        return Entry(("127.0.0.1", 1), [], dict.fromkeys(members))

    agents = {"c": entry(0), "b": entry(2), "a": entry(1), "new": entry(7)}
    assert order(agents, View(1, (0, 1, 2), 0), None) == ["c", "a", "b", "new"]
    assert order(agents, View(1, (0, 1, 2), 0), "b") == ["b", "c", "a", "new"]
    assert order(agents, View(2, (1, 2), 1), None) == ["a", "b", "c", "new"]


def test_only_what_is_seen_dead_here_is_proven() -> None:
    with start(["sleep", "60"]) as agent, start(["sleep", "60"]) as member:
        entry = Entry(("127.0.0.1", 1), list(agent.identity), {4: list(member.identity)})
        assert proven_dead(entry) is None
        agent.fence(Deadline(30))
        assert proven_dead(entry) is None  # its member lives
        member.fence(Deadline(30))
        assert proven_dead(entry) == {4}
        assert proven_dead(replace(entry, members={4: list(member.identity), 5: None})) is None
    elsewhere = [*list(identity(os.getpid()))[:2], "another boot/1", "another host"]
    assert proven_dead(Entry(("10.0.0.1", 1), elsewhere, {4: elsewhere})) is None


@pytest.mark.parametrize("record", [{}, {"name": "a", "members": ["1"], "term": 1, "dead": []}])
def test_malformed_pledges_are_refused(record: dict[str, object]) -> None:
    with pytest.raises(WireError):
        Pledge.from_json(record)
    with pytest.raises(WireError):
        Entry.from_json(record)


def test_pledges_and_entries_survive_the_wire() -> None:
    it = pledge("b", 1, 2, term=4, view=OLD, seen=3, dead=(0,))
    assert Pledge.from_json(it.to_json()) == it
    entry = Entry(("h", 7), [1, 2, "b", "h"], {3: None, 4: [5]})
    assert Entry.from_json(entry.to_json()) == entry


@pytest.mark.parametrize("nproc", [-1, "2", 1 << 40, True, None])
def test_agents_with_odd_numbers_of_ranks_are_sent_away(nproc: object) -> None:
    """A number below 0 would have ids given twice."""
    job = Job("a", cast(Any, None), Rules(1), token=None, listen=("127.0.0.1", 0), join=None,
              facts={}, offer={}, adopt=print, on_event=lambda kind, content: None)  # fmt: skip
    hello = {"pledge": pledge("b").to_json(), "entry": Entry(("h", 1), []).to_json()}
    try:
        with pytest.raises(WireError, match="ranks"):
            job._welcome({**hello, "nproc": nproc}, cast(Any, None))
    finally:
        job.close()
