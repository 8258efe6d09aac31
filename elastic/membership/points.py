"""The named points of a change of members at which faults are injected, in order."""

from planaria.core.points import declare

JOIN = declare("elastic.membership.join", "a process is about to ask to take part")
ASKED = declare("elastic.membership.asked", "it has asked and was not answered yet")
ADMITTED = declare("elastic.membership.admitted", "it was admitted, nothing was set up yet")
REGROUP = declare("elastic.membership.regroup", "a member's groups are gone, nobody knows yet")
STOOD = declare("elastic.membership.stood", "it has said where it stands, no answer yet")
AGREED = declare("elastic.membership.agreed", "it knows the new generation, nothing was set up yet")
LEAVE = declare("elastic.membership.leave", "a member is about to say that it goes")
LEFT = declare("elastic.membership.left", "the others know that it goes")
FINISH = declare("elastic.membership.finish", "a member is about to say that the run is done")
PROPOSED = declare("elastic.membership.proposed", "a new generation is decided, nobody was told")
ELECTED = declare("elastic.membership.elected", "an agent has become the coordinator")

#: Those that a joiner passes.
JOINING = [JOIN, ASKED, ADMITTED]
#: Those that every survivor passes.
REGROUPING = [REGROUP, STOOD, AGREED]
