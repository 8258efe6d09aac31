"""What becomes of what members say: the rules of generations, without any I/O.

Time is passed in, and what is to be done comes back as a list of actions. Members send standings
once they have destroyed their groups; the next generation is decided when all of the last one that
are not proven dead have, or a quorum of them where others are out of reach.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planaria.elastic.membership.entries import Member, Past
from planaria.elastic.membership.quorum import differences, has_quorum
from planaria.elastic.membership.rules import (
    JOIN,
    LEAVE,
    STOP,
    Action,
    Fence,
    Note,
    Publish,
    Rules,
    Start,
    Stop,
    Tell,
)
from planaria.elastic.membership.view import Standing, View
from planaria.elastic.membership.watching import Beat, SlowOnes, Watched, to_blame

# A coordinator that has not looked for so large a part of `hang_s` judges nobody by that time.
_PAUSES = 4


@dataclass
class Decider:
    """Decides for the whole job.

    Args:
        rules: Sizes, policy and budgets.
        now: Seconds on the clock that all other calls use, too.
        past: The generation to take over, where an earlier coordinator is gone.
    """

    rules: Rules
    now: float
    past: Past | None = None
    generation: int = field(default=0, init=False)
    members: tuple[int, ...] = field(default=(), init=False)
    next_id: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._table: dict[int, Member] = {}
        self._dead: set[int] = set()  # of the current generation, proven
        self._gone: set[int] = set()  # of all time: never again
        self._left: set[int] = set()
        self._finished: set[int] = set()
        self._expected: dict[int, float] = {}  # started then, and not heard of yet
        self._quiet: set[int] = set()  # have hung up, and end in their own time
        self._killed: set[int] = set()
        self._facts: Mapping[str, Any] | None = None
        self._since: float | None = None  # when regrouping began
        self._stands_since: float | None = None  # when the first said where it stands
        self._acts: list[Action] = []
        self._stop_wanted = False
        self._leaving: set[int] = set()
        self._failed_starts = 0
        self._step: int | None = None
        self._repeats = 0
        self._ticked = self.now
        self._owed = 0  # replacements for those that an earlier coordinator has lost
        self._slow = SlowOnes(self.rules.slow_factor)
        self._last = ""  # why the job cannot go on, while those that are left still save
        self.stopped: str | None = None
        self.view: View | None = None
        self._before: tuple[frozenset[int], frozenset[int]] = frozenset(), frozenset()
        self._target = self.rules.world
        if self.past is not None:
            self.generation, self.members = self.past.generation, self.past.members
            self.next_id, self._facts = self.past.next_id, self.past.facts
            self._last = self.past.last
            self._dead = set(self.past.dead) & set(self.members)
            self._gone = set(self.past.dead)
            self._owed = len(self._dead)
            for member in set(self.members) - self._dead:
                entry = self._entry(member, self.now)
                entry.away_since = self.now
            self._since = self.now if self.generation else None

    # What members and agents say ---------------------------------------------------------------

    def new_ids(self, count: int, now: float) -> list[int]:
        """Ids for processes that are about to start; none was given before."""
        first, self.next_id = self.next_id, self.next_id + count
        self._expected.update(dict.fromkeys(range(first, self.next_id), now))
        return list(range(first, self.next_id))

    def join(self, member: int, facts: Mapping[str, Any], now: float) -> list[Action]:
        """A process asks to take part."""
        if member in self.members and member not in self._dead:
            if self.view is not None:
                self._tell(member, "view", view=self.view.seen_by(member).to_json())
            return self._done(now)
        if member in self._gone or self.stopped is not None:
            self._tell(member, "stopped", reason=self.stopped or "it was given up for dead")
            return self._done(now)
        self.next_id = max(self.next_id, member + 1)
        if self._facts is None:
            self._facts = dict(facts)
        wrong = differences(self._facts, facts)
        if wrong:
            self._expected.pop(member, None)
            self._failed_starts = self.rules.starts  # another one would be refused, too
            self._tell(member, "refused", reason="; ".join(wrong))
            self._note("refused", member=member, reason="; ".join(wrong))
            return self._done(now)
        entry = self._entry(member, now)
        if not entry.asked:
            self._note("asks", member=member)
        entry.asked = True
        self._expected.pop(member, None)
        return self._done(now)

    def stand(self, member: int, standing: Standing, now: float) -> list[Action]:
        """A member has destroyed its groups and says where it stands."""
        entry = self._table.get(member)
        if member in self._gone or member not in self.members or entry is None:
            self._tell(member, "stopped", reason="it is no member: it was left out or given up")
            return self._done(now)
        if standing.generation != self.generation:
            # An answer that it has missed; anything else it cannot have been told.
            if standing.generation < self.generation and self.view is not None:
                self._tell(member, "view", view=self.view.seen_by(member).to_json())
            return self._done(now)
        if entry.standing is None:
            self._note("stands", member=member, step=standing.committed, reason=standing.reason)
        entry.standing = standing
        if standing.leaving:
            self._left.add(member)
        self._begin(now, ())
        if self._stands_since is None:
            self._stands_since = now
        return self._done(now)

    def dead(self, ids: Iterable[int], now: float, how: str = "") -> list[Action]:
        """Processes are proven dead."""
        fresh = [each for each in ids if each not in self._gone]
        lost = []
        for member in fresh:
            self._gone.add(member)
            entry = self._table.pop(member, None)
            if member in self._expected:
                del self._expected[member]
                self._failed_starts += 1
            if member not in self.members:
                if entry is not None:
                    self._note("lost", member=member, how=how, joining=True)
                continue
            self._dead.add(member)
            if member in self._finished:
                continue
            if member in self._left:
                self._target = max(self._target - 1, 1)
            lost.append(member)
            self._note("left" if member in self._left else "lost", member=member, how=how)
        if lost:
            self._begin(now, lost)
        if fresh:
            self._replace(len(fresh), now)
        if fresh and self.generation == 0 and not self._may_start():
            self._stop(f"member {fresh[0]} ended before the job began ({how or 'unknown how'})")
        return self._done(now)

    def beat(self, member: int, beat: Beat, now: float) -> list[Action]:
        """A sign of life."""
        entry = self._table.get(member)
        if entry is not None:
            entry.watched.hear(beat, now)
        return []

    def finish(self, member: int, now: float, *, complete: bool = False) -> list[Action]:
        """A member's run is done; it may end."""
        if member in self.members:
            self._finished.add(member)
            if complete:
                self._last = ""  # nothing is left undone
        return self._done(now)

    def hang_up(self, member: int) -> None:
        """A member says nothing any more from now on, as it has said."""
        self._quiet.add(member)

    def reach(self, ids: Iterable[int], near: bool, now: float) -> list[Action]:
        """The agent of members came into reach, or went out of it."""
        for member in ids:
            entry = self._table.get(member)
            if entry is not None and near:
                entry.away_since = None
                entry.watched.again(now)
            elif entry is not None and entry.away_since is None:
                entry.away_since = now
                self._note("away", member=member)
        if near and self._owed:
            owed, self._owed = self._owed, 0
            self._replace(owed, now)
        return self._done(now)

    def stop(self, now: float) -> list[Action]:
        """The whole job is to save and end at the next step boundary."""
        self._stop_wanted = True
        if self.generation == 0:
            self._stop("it was told to stop before it began")
        return self._done(now)

    def leave(self, ids: Iterable[int], now: float) -> list[Action]:
        """Members are to go at the next step boundary."""
        self._leaving.update(ids)
        return self._done(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        if now - self._ticked > self.rules.hang_s / _PAUSES:
            # This process itself stood still: what it has not heard meanwhile proves nothing.
            for entry in self._table.values():
                entry.watched.again(now)
        self._ticked = now
        self._watch(now)
        if self._since is None and self._long_away(now):
            self._begin(now, ())  # whoever waits for them waits in vain
        return self._done(now)

    def may_publish(self, remembering: Iterable[int]) -> bool:
        """Whether enough of the generation before know of the new one, by their agents.

        Args:
            remembering: Members whose agents remember it.
        """
        members, dead = self._before
        return has_quorum(set(remembering), members, dead)

    @property
    def over(self) -> bool:
        """Whether every member has finished, left or died, or the job was stopped."""
        waits = self._since is not None
        done = self.generation > 0 and not self._entitled() and not waits
        return self.stopped is not None or done

    @property
    def facts(self) -> Mapping[str, Any] | None:
        """What has to be equal on all, once the first has said it."""
        return self._facts

    @property
    def gone(self) -> frozenset[int]:
        """All that ever died or were left out."""
        return frozenset(self._gone)

    # What is done about it ---------------------------------------------------------------------

    def _done(self, now: float) -> list[Action]:
        if self.stopped is None:
            if self.generation == 0:
                self._found(now)
            elif self._since is not None:
                self._regroup(now, self._since)
            if self._since is None:
                self._say_what_is_wanted()
                if self._last and not self._entitled() and self.stopped is None:
                    self._stop(self._last)
            if self._finished and self.over:
                for member in self._ready():
                    self._tell(member, "stopped", reason="the run is done")
                    self._table[member].asked = False
        acts, self._acts = self._acts, []
        return acts

    def _found(self, now: float) -> None:
        ready = self._ready()
        late = now - self.now > self.rules.join_s
        if len(ready) >= self._target or (late and len(ready) >= self.rules.minimum):
            self._publish(tuple(ready[: self.rules.most]), (), None, now)
        elif late:
            self._stop(f"{len(ready)} members came within {self.rules.join_s:g} s, "
                       f"{self.rules.minimum} are the least")  # fmt: skip

    def _regroup(self, now: float, since: float) -> None:
        rules, entitled = self.rules, self._entitled()
        present = {
            m for m in entitled if (e := self._table.get(m)) is not None and e.standing is not None
        }
        if self._stands_since is not None:
            since = self._stands_since
        elif any(self._table[m].away_since is None for m in entitled):
            return  # they have not noticed yet: nobody waits for anybody
        late = now - since > rules.recovery_s
        for member in entitled - present:
            away = self._table[member].away_since
            # What is in reach is waited for: it stands, or is fenced, or is proven dead.
            if not late and (away is None or now - away < rules.contact_s):
                return
            if away is None:
                # It may still write what others are about to write, too.
                self._stop(f"member {member} was killed, and is not proven to have stopped")
                return
        finished = self._finished & set(self.members)
        if not has_quorum(present | finished, self.members, self._dead - finished):
            if late:
                self._stop(f"no quorum: {len(present)} of {len(self.members)} members are in reach")
            return
        standings = [s for m in present if (s := self._table[m].standing) is not None]
        staying = sorted(m for m in present if m not in self._left)
        if not entitled and finished:
            # The run is done, and what was lost at its end is not missed.
            self._since = self._stands_since = None
            return
        step = max((s.committed for s in standings), default=None) if staying else None
        if not self._last and self._waits_for_replacements(len(staying), now - since):
            return
        if self._last:
            self._part(self._last, staying, step, now)
            return
        joining = self._ready()[: max(rules.most - len(staying), 0)]
        if len(staying) + len(joining) < rules.minimum or not staying + joining:
            hope = self._expected or self._may_start() or (staying and rules.wait_for_joiners)
            if late or not hope:
                reason = (
                    f"{len(staying)} of {len(self.members)} members are left, "
                    f"{rules.minimum} are the least"
                )
                self._part(reason, staying, step, now)
            return
        members = tuple(sorted({*staying, *joining}))
        self._publish(members, tuple(joining) if staying else (), step, now)

    def _part(self, reason: str, staying: Sequence[int], step: int | None, now: float) -> None:
        """Ends the job; those that are left, a quorum, have a last generation to save in."""
        if not staying:
            self._stop(reason)
            return
        self._last = reason
        self._publish(tuple(staying), (), step, now)

    def _waits_for_replacements(self, staying: int, waited: float) -> bool:
        rules = self.rules
        vacant = self._target - staying - len(self._ready())
        if not rules.waits or vacant <= 0 or not (self._expected or self._may_start()):
            if rules.policy == "replace" and vacant > 0:
                self._last = f"{vacant} members are lost and could not be replaced"
            return False
        if waited <= rules.patience_s:
            return True
        if rules.policy == "replace":
            self._last = f"{vacant} members were not replaced within {rules.patience_s:g} s"
        return False

    def _publish(
        self, members: tuple[int, ...], joined: tuple[int, ...], step: int | None, now: float
    ) -> None:
        lost = tuple(m for m in self.members if m not in members)
        self._repeats = self._repeats + 1 if lost and step == self._step else 0
        self._step = step
        if self._repeats >= self.rules.repeats and not self._last:
            self._last = f"{self._repeats} times in a row members were lost at step {step or 0}"
            members, joined = tuple(m for m in members if m not in joined), ()
            if not members or step is None:
                self._stop(self._last)
                return
        self._before = frozenset(self.members), frozenset(self._dead)
        # Whoever was merely out of reach is out for good: it may not have noticed yet.
        self._gone.update(lost)
        for member in lost:
            self._table.pop(member, None)
        self._dead = set()
        if set(members) - set(self.members):
            self._failed_starts = 0  # not in vain
        self.generation += 1
        self.members = members
        self._since = self._stands_since = None
        for member in members:
            entry = self._table[member]
            entry.standing, entry.asked, entry.told = None, False, None
            entry.watched.again(now)
        if self._ready():
            self._note("waiting", members=self._ready())
        self.view = View(self.generation, members, members[0], joined, lost, step, last=self._last)
        self._acts.append(Publish(self.view))

    def _begin(self, now: float, lost: Collection[int]) -> None:
        """Has all regroup, and tells them whom the job has lost."""
        if self.generation == 0 or self.stopped is not None:
            return
        if self._since is not None and not lost:
            return
        if self._since is None:
            self._since = now
        for member in sorted(self._entitled()):
            self._tell(member, "lost", generation=self.generation, ids=sorted(lost))

    def _replace(self, most: int, now: float) -> None:
        if not self.rules.replaces or self.stopped is not None or self._stop_wanted or self._last:
            return
        have = len(self._entitled()) if self.generation else 0
        if self._finished:
            return  # the others are about to finish, too
        vacant = self._target - have - len(self._ready()) - len(self._expected)
        lost = sorted(self._dead - self._left)
        for index in range(min(vacant, most)):
            if not self._may_start():
                self._note("no_more_starts")
                return
            (member,) = self.new_ids(1, now)
            self._acts.append(Start(member, lost[index] if index < len(lost) else None))

    def _may_start(self) -> bool:
        return self.rules.replaces and self._failed_starts < self.rules.starts

    def _watch(self, now: float) -> None:
        """Has those who hang killed; what is killed is proven dead later."""
        if self.stopped is not None:
            return
        watched = {
            m: e.watched
            for m in self._entitled()
            if (e := self._table[m]).away_since is None and not e.fencing
        }
        for member, reason in self._silent(now).items():
            self._killed.add(member)
            self._note("fenced", member=member, reason=reason)
            self._acts.append(Fence(member, reason))
        standing = {m for m in watched if self._table[m].standing is not None}
        blamed = to_blame(watched, standing, self._since, self.rules, now, self._stands_since)
        for member, reason in blamed.items():
            self._table[member].fencing = True
            self._note("fenced", member=member, reason=reason)
            self._acts.append(Fence(member, reason))
        for member, step_s, median_s in self._slow.look(watched, now):
            self._note("slow", member=member, step_s=step_s, median_s=median_s)

    def _long_away(self, now: float) -> bool:
        """Whether members have been out of reach for so long that others may go on without."""
        away = [self._table[m].away_since for m in self._entitled()]
        return any(since is not None and now - since >= self.rules.contact_s for since in away)

    def _silent(self, now: float) -> dict[int, str]:
        """Processes that take no part, yet or any more, and show no sign of life."""
        rules, found = self.rules, {}
        for member, since in self._expected.items():
            if self.generation and now - since >= rules.start_s:
                found[member] = f"has not asked to join for {now - since:.1f} s"
        for member, entry in self._table.items():
            apart = member in self._finished or member not in self.members
            silent = now - entry.watched.heard
            if apart and entry.away_since is None and silent >= rules.hang_s:
                found[member] = f"no heartbeat for {silent:.1f} s"
        return {m: why for m, why in found.items() if m not in self._killed | self._quiet}

    def _say_what_is_wanted(self) -> None:
        join = bool(self._ready()) and len(self.members) < self.rules.most and not self._last
        for member in sorted(self._entitled()):
            wanted = STOP if self._stop_wanted else LEAVE if member in self._leaving else None
            wanted = wanted or (JOIN if join else None)
            entry = self._table[member]
            if wanted != entry.told:
                entry.told = wanted
                self._tell(member, "wanted", what=wanted)

    def _entitled(self) -> set[int]:
        """Members that may still have a say."""
        return {
            m for m in self.members
            if m not in self._dead and m not in self._finished and m in self._table
        }  # fmt: skip

    def _ready(self) -> list[int]:
        """Processes that have asked to join, and may."""
        return sorted(
            m for m, e in self._table.items()
            if e.asked and e.away_since is None and m not in self.members
        )  # fmt: skip

    def _entry(self, member: int, now: float) -> Member:
        return self._table.setdefault(member, Member(Watched(now)))

    def _tell(self, member: int, kind: str, **content: Any) -> None:
        self._acts.append(Tell(member, {"type": kind, **content}))

    def _note(self, kind: str, **content: Any) -> None:
        self._acts.append(Note(kind, {"generation": self.generation, **content}))

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._acts.append(Stop(reason))
