"""The named points of a snapshot in memory at which faults are injected, in order."""

from planaria.core.points import declare

CAPTURE = declare("memory.capture", "a rank asks for room for its image")
SEAL = declare("memory.seal", "an image is complete, nobody was told yet")
FETCH = declare("memory.exchange.fetch", "before blocks are asked of the nodes that hold them")
ENCODE = declare("memory.exchange.encode", "before the parity of a batch of blocks is formed")
STORE = declare("memory.exchange.store", "before parity goes to another node")
PREPARE = declare("memory.prepare", "a node has its part, the leader was not told yet")
DECIDED = declare("memory.decided", "all nodes are prepared, no node has committed yet")
COMMIT = declare("memory.commit", "the leader has committed, no other node was told yet")
COMPLETE = declare("memory.complete", "all nodes have committed, their ranks do not know yet")
READ = declare("memory.read", "before bytes of a snapshot are read")

#: Every point of a snapshot.
SNAPSHOT = [CAPTURE, SEAL, FETCH, ENCODE, STORE, PREPARE, DECIDED, COMMIT, COMPLETE]
#: Those that every node passes, not only the leader.
ON_ALL = [CAPTURE, SEAL, FETCH, ENCODE, STORE, PREPARE]
