"""What is lost with a rank has to be elsewhere: three ways, for one loss and for two, compared.

- *shadows*: another rank has a copy of a block's master and slots, is sent the block's reduced
  gradient, and makes the same update (what sessions do by default).
- *snapshot*: the memory tier's snapshot at each step, with parity over the nodes.
- *log*: another rank is sent the reduced gradient, and keeps it; a snapshot at every K-th step.
  After a loss the steps since are replayed on what the snapshot had.

Four ranks in real sessions of one model; each is a node of its own. Computing is emulated by a wait
in each micro-batch, added to a real pass (*emulated compute*). CPU seconds are those of all ranks
and all snapshot processes; bytes are what TCP has sent, less what a session without redundancy
sends; memory is the proportional set size of ranks and snapshot processes, likewise. The pause is
the time from the step before a SIGKILL to the next new one, less a step. Losses are compared with
those of one rank, bit for bit. Where a pause is made up of other rows' parts it is called computed.

Run: ``make bench SUITE=redundancy``, or
``python tests/benchmarks/bench_redundancy.py [--mb 16] [--wait 0.1] [--turns 3] [--log 16]``.
"""

import argparse
import collections
import os
import re
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import NotMeasured, machine, publish_tables

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from members import LocalMembers
from memory_jobs import runtime_folder
from ranks import run_ranks, stop_server

from planaria.checkpoint import LATER, Checkpointer, MemoryTier
from planaria.elastic import GlobalBatch, Session
from planaria.elastic.faults import sockets
from planaria.elastic.membership import Alone, connect
from planaria.elastic.partition.optimizer import ShardedOptimizer

WORLD, WIDTH, MICRO_BATCHES = 4, 512, 8
NONE, SHADOWS, SNAPSHOT, LOG = "none", "shadows", "snapshot", "log"
_TICK = os.sysconf("SC_CLK_TCK")
# Where in Linux's struct tcp_info the bytes are that the other side has acknowledged.
_BYTES_ACKED = 120


class Vectors:
    """Random vectors."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


class GradientLog:
    """Has the shadows of blocks keep reduced gradients, and not apply them."""

    def __init__(self, steps: int) -> None:
        self.kept: collections.deque[dict[int, torch.Tensor]] = collections.deque(maxlen=steps)
        self._apply = apply = ShardedOptimizer.apply

        def own_alone(each: Any, gradient: Any, touched: Any, factor: float = 1.0) -> None:
            found, masters, own = each._of_blocks(gradient), each._masters, set(each.owned)
            self.kept.append({i: found[i].clone() for i in masters if i not in own})
            each._masters = {i: master for i, master in masters.items() if i in own}
            apply(each, gradient, touched, factor)
            each._masters = masters

        ShardedOptimizer.apply = own_alone  # pyright: ignore[reportAttributeAccessIssue]

    def replay(self, optimizer: Any) -> float:
        """Makes the updates that were kept, as after a loss; seconds for one step of the log."""
        begun = time.perf_counter()
        for gradients in self.kept:
            for i, value in gradients.items():
                optimizer._masters[i].grad = value.view(optimizer._masters[i].shape)
            type(optimizer._inner).step(optimizer._inner)
        return (time.perf_counter() - begun) / max(len(self.kept), 1)

    @staticmethod
    def not_held(optimizer: Any) -> int:
        """Bytes of masters and slots of shadows, which a log does without."""
        own = set(optimizer.owned)
        shadows = [optimizer.export(i) for i in optimizer.held if i not in own]
        return sum(v.nbytes for state in shadows for v in state.values() if torch.is_tensor(v))


def cpu_of(pids: Sequence[int]) -> float:
    """CPU seconds of processes so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICK


def sent_of(pids: Sequence[int]) -> int:
    """Bytes that the TCP connections which processes have now have sent."""
    total = 0
    # One socket may have several numbers.
    for each in {c.inode: c for c in sockets.connections(pids)}.values():
        with sockets.take(each.pid, each.fd) as taken:
            info = taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        total += struct.unpack_from("Q", info, _BYTES_ACKED)[0]
    return total


def memory_of(pids: Sequence[int]) -> int:
    """Their proportional set size in bytes."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.findall(r"^Pss:\s+(\d+)", text, re.M)[0]) << 10 for text in texts)


def train(membership: Any, way: str, losses: int, options: dict[str, Any]) -> dict[str, Any]:
    """One rank's run."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(options["mb"])]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = GlobalBatch(Vectors(), 2 * MICRO_BATCHES, 2, seed=1)
    steps, kill_at, ckpt = options["steps"], options["kill_at"], None
    log = GradientLog(options["log"]) if way == LOG else None
    if way == SNAPSHOT:
        # Without a budget it takes what two images and their parity need.
        tier = MemoryTier(losses=losses, node=f"n{membership.id}", idle_s=30)
        ckpt = Checkpointer(options["folder"], {"model": model}, memory=tier, process_group=LATER)
    seen: list[tuple[int, float, float]] = []
    pids, said = [os.getpid()], dict[str, Any]()
    with Session(model, optimizer, data, steps=steps, membership=membership, checkpointer=ckpt,
                 redundancy=losses if way in (SHADOWS, LOG) else 0) as session:  # fmt: skip
        for step in session:
            if step.number == 2 and "cpu" not in said:
                memory = None if ckpt is None else ckpt._job.attached.memory
                if memory is not None and memory.client is not None:
                    pids.append(memory.client.pid)
                said |= {"cpu": cpu_of(pids), "sent": sent_of(pids)}
            if step.number == kill_at - 1 and "memory" not in said:
                count = kill_at - 1 - 2
                said["cpu"] = (cpu_of(pids) - said["cpu"]) / count
                said["sent"] = (sent_of(pids) - said["sent"]) / count
                said["memory"] = memory_of(pids)
            with step:
                for batch in step.micro_batches():
                    dying = WORLD - losses <= membership.id and step.number == kill_at
                    if dying and way in (SHADOWS, SNAPSHOT) and len(seen) == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(options["wait"])
                    step.backward(model(batch).square().mean())
            if step.committed:
                seen.append((step.number, time.perf_counter(), step.metrics["loss"]))
        if log is not None:
            optimizer_of_blocks = session._engine.updater.sharded  # pyright: ignore[reportAttributeAccessIssue]
            said["memory"] -= log.not_held(optimizer_of_blocks)
            said["replay"] = log.replay(optimizer_of_blocks)
    return {**said, "seen": seen}


def alone(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same on one rank."""
    return train(Alone(), NONE, 0, {**options, "wait": 0.0})


def member(me: int, way: str, losses: int, options: dict[str, Any]) -> dict[str, Any]:
    """One of several."""
    return train(connect(), way, losses, options)


def measure(
    way: str, losses: int, options: dict[str, Any], reference: dict[int, float]
) -> dict[str, float]:
    """One run of one way."""
    with tempfile.TemporaryDirectory() as folder, runtime_folder(Path(folder) / "runtime"):
        options = {**options, "folder": str(Path(folder) / "ckpt")}
        with LocalMembers(WORLD, member, way, losses, options, timeout=280) as job:
            results = job.wait()
    there = [result.value for result in results.values() if result.value is not None]
    expected = WORLD if way in (NONE, LOG) else WORLD - losses
    if len(there) != expected:
        raise NotMeasured(f"{way}, {losses} losses: {[r.error for r in results.values()]}")
    for each in there:
        if {n: loss for n, _, loss in each["seen"]} != reference:
            raise NotMeasured(f"{way}, {losses} losses: losses are not those of one rank")
    seen, kill_at = there[0]["seen"], options["kill_at"]
    at = {n: t for n, t, _ in reversed(seen)}  # of a step that was done twice the first time
    step = statistics.median(at[n] - at[n - 1] for n in range(3, kill_at))
    last = max(t for n, t, _ in seen if t <= at[kill_at - 1])
    made = {name: statistics.fmean(each[name] for each in there)
            for name in ("cpu", "sent", "memory")}  # fmt: skip
    pause = at[kill_at] - last - step
    return {"step": step, "pause": pause, "replay": there[0].get("replay", 0.0), **made}


def table(found: dict[tuple[str, int], dict[str, float]], log: int) -> list[dict[str, Any]]:
    """A row a way."""
    base, rows = found[NONE, 0], list[dict[str, Any]]()
    for (way, losses), each in found.items():
        if way == NONE:
            continue
        beyond = {name: each[name] - base[name] for name in ("step", "cpu", "sent", "memory")}
        pause, how = each["pause"], "measured"
        snapshot = found[SNAPSHOT, losses]
        if way == LOG:
            for name in ("step", "cpu", "sent"):
                beyond[name] += (snapshot[name] - base[name]) / log
            beyond["memory"] += snapshot["memory"] - base["memory"]
            # On average half of the log. What is lost of the snapshot has to be decoded as well.
            pause, how = snapshot["pause"] + log / 2 * each["replay"], "computed"
        rows.append({
            "losses survived": losses,
            "way": way,
            "a step longer by ms": 1e3 * beyond["step"],
            "CPU ms a step and rank": 1e3 * beyond["cpu"],
            "sent MB a step and rank": beyond["sent"] / 1e6,
            "memory of a rank MB": beyond["memory"] / 1e6,
            "pause s": pause,
            "pause": how,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=16, help="of the model")
    parser.add_argument("--wait", type=float, default=0.1, help="seconds in each micro-batch")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--log", type=int, default=16, help="steps between snapshots beside a log")
    parser.add_argument("--losses", default="1,2")
    args = parser.parse_args()
    started = machine()
    options = {**vars(args), "kill_at": args.steps - 3}
    (one,) = run_ranks(1, alone, options, init_group=False, timeout=280)
    reference = {n: loss for n, _, loss in one["seen"]}
    ways = [(NONE, 0), *((way, int(m)) for m in args.losses.split(",")
                         for way in (SHADOWS, SNAPSHOT, LOG))]  # fmt: skip
    values: dict[tuple[str, int], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(args.turns):
        for way in ways:
            values[way].append(measure(*way, options, reference))
    median: Callable[[Any], float] = statistics.median
    found = {way: {name: median([each[name] for each in runs]) for name in runs[0]}
             for way, runs in values.items()}  # fmt: skip
    base = found[NONE, 0]
    step, sent = base["step"], base["sent"] / 1e6
    title = (
        f"Redundancy of a model of {args.mb} MB with AdamW on {WORLD} ranks, beyond a session "
        f"without: {step:.2f} s a step, {sent:.1f} MB sent a step and rank (emulated compute)"
    )
    publish_tables("redundancy", [(title, table(found, args.log))], vars(args),
                   started=started)  # fmt: skip
    stop_server()


if __name__ == "__main__":
    main()
