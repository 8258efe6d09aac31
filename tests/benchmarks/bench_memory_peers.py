"""memory_peers: snapshots at each step in the memory of others, beside lm-resiliency's replicas.

    python tests/benchmarks/bench_memory_peers.py --lm FOLDER [--mb 32] [--ranks 4] [--turns 5]

FOLDER is what ``pip install --no-deps --target FOLDER lm-resiliency==0.2.0`` has filled; it is no
extra, since installed it registers a rendezvous with torch that fails and warns in every job. Ranks
on gloo, both survive the loss of any one node. *Stalled* is the time of the call and of the wait
before the next update, where ``--compute`` seconds of forward and backward come between them
(*emulated compute*); *update next* the same without these; *protected* is from the call until all
nodes have what they must. *Taken back* is a restore of a rank that was
not killed, from its own copy: lm-resiliency keeps it in the rank itself, where it is lost with it.
What is restored is compared bit for bit; ours compares checksums, theirs in memory has none.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from bench_memory_training import cpu_of, model_of
from ranks import run_ranks
from timing import Goal, Turns, machine, publish_tables, rows_of

from planaria.checkpoint import Checkpointer, MemoryTier

#: What is measured of each, in the order in which it is done.
WHAT = ("update next", "protected", "CPU", "taken back", "memory", "stalled")
PEER = "lm-resiliency"


class Planaria:
    def __init__(self, rank: int, folder: str, model: torch.nn.Linear) -> None:
        nbytes = model.weight.nbytes
        tier = MemoryTier(budget=3 * nbytes + (8 << 20), node=f"n{rank}", losses=1)
        self._ckpt = Checkpointer(f"{folder}/root", {f"model{rank}": model}, memory=tier)

    def save(self, step: int) -> None:
        self._ckpt.step(step)

    def before_update(self) -> None:
        self._ckpt.before_update()

    def wait(self) -> None:
        assert self._ckpt.last_snapshot is not None
        self._ckpt.last_snapshot.wait_committed()

    def load(self) -> None:
        report = self._ckpt.restore()
        assert report is not None
        assert report.tier == "memory"

    @property
    def node_pid(self) -> int | None:
        memory = self._ckpt._job.attached.memory
        return None if memory is None or memory.client is None else memory.client.pid

    def held(self) -> int:
        """Bytes of memory that snapshots take on this node."""
        memory = self._ckpt._job.attached.memory
        assert memory is not None
        assert memory.client is not None
        return memory.client.status()["used"]

    def close(self) -> None:
        self._ckpt.close()


class Replicas:
    """lm-resiliency's manager: each rank's tensors, and a copy of its partner's."""

    node_pid = None

    def __init__(self, rank: int, folder: str, model: torch.nn.Linear) -> None:
        from lm_resiliency.checkpointing import (  # pyright: ignore[reportMissingImports]
            InMemoryCheckpointManager,
            InMemoryCkptConfig,
        )

        self._model = model
        self._manager = InMemoryCheckpointManager(
            InMemoryCkptConfig(
                replication_jump=1, disk_folder=f"{folder}/lm", disk_flush_interval=0,
                pin_memory=False, run_id="benchmark",
            )
        )  # fmt: skip

    def save(self, step: int) -> None:
        self._manager.save_tensors([self._model.weight.detach()], step)

    def before_update(self) -> None:
        pass  # on a CPU the call has copied all of it

    def wait(self) -> None:
        self._manager.maybe_wait()
        assert self._manager.finalize_replication()

    def load(self) -> None:
        found = self._manager.load_tensors()
        assert found is not None
        with torch.no_grad():
            self._model.weight.copy_(found[0][0])

    def held(self) -> int:
        pool = self._manager._buffer_pool
        slots = [pool.own_current, pool.own_previous, pool.peer_current, pool.peer_previous]
        return sum(each.nbytes for slot in slots for each in slot.tensors)

    def close(self) -> None:
        pass  # its close writes to disk


def one_rank(
    rank: int, folder: str, mb: int, turns: int, compute: float, lm: str
) -> dict[str, list[list[float]]]:
    """What each turn gave, by variant and in the order of `WHAT`."""
    torch.set_num_threads(1)
    kinds: dict[str, type[Planaria] | type[Replicas]] = {"planaria": Planaria}
    if lm:
        sys.path.insert(0, lm)
        kinds[PEER] = Replicas
    models = {name: model_of(mb, float(rank)) for name in kinds}
    tiers = {name: kind(rank, folder, models[name]) for name, kind in kinds.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for turn in range(1, turns + 3):
        for name, tier in tiers.items():
            with torch.no_grad():
                models[name].weight.fill_(rank * 1000.0 + turn)
            nodes = [] if tier.node_pid is None else [tier.node_pid]
            dist.barrier()
            cpu = time.process_time() + sum(map(cpu_of, nodes))
            began = time.perf_counter()
            tier.save(2 * turn)
            tier.before_update()
            stalled = time.perf_counter() - began
            tier.wait()
            protected = time.perf_counter() - began
            nodes = [] if tier.node_pid is None else [tier.node_pid]
            cpu = time.process_time() + sum(map(cpu_of, nodes)) - cpu
            dist.barrier()
            with torch.no_grad():
                models[name].weight.zero_()
            began = time.perf_counter()
            tier.load()
            back = time.perf_counter() - began
            assert bool((models[name].weight == rank * 1000.0 + turn).all())
            dist.barrier()
            began = time.perf_counter()
            tier.save(2 * turn + 1)
            called = time.perf_counter() - began
            time.sleep(compute)
            began = time.perf_counter()
            tier.before_update()
            waited = time.perf_counter() - began
            tier.wait()
            dist.barrier()
            if turn > 2:
                held = float(tier.held())
                found[name].append([stalled, protected, cpu, back, held, called + waited])
    for tier in tiers.values():
        tier.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--lm",
        default=os.environ.get("LM_RESILIENCY", ""),
        help="folder that lm-resiliency is installed in",
    )
    parser.add_argument("--mb", type=int, default=32, help="state of each rank")
    parser.add_argument("--ranks", type=int, default=4, help="an even number")
    parser.add_argument("--compute", type=float, default=0.3, help="seconds before an update")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    started = machine()
    settings = {name: value for name, value in vars(args).items() if name != "lm"}
    missing = {} if args.lm else {PEER: "not installed: name its folder with --lm"}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        os.environ["PLANARIA_RUNTIME_DIR"] = folder + "/run"
        os.mkdir(folder + "/run", 0o700)
        ranks = run_ranks(
            args.ranks, one_rank, folder, args.mb, args.turns, args.compute, args.lm, timeout=600
        )
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    goals: list[Goal] = []
    for i, what in enumerate(WHAT):
        # All ranks must wait for the slowest; what they use adds up.
        over: Any = sum if what in ("CPU", "memory") else max
        values: dict[str, list[float]] = {
            name: [float(over(rank[name][t][i] for rank in ranks)) for t in range(args.turns)]
            for name in ranks[0]
        }
        turns = Turns(values, dict(missing))
        if what == "memory":
            state = args.ranks * (args.mb << 20)
            tables.append((
                "Memory of all nodes, for each byte of state (measured)",
                [
                    {"variant": n, "between snapshots": v[-1] / state,
                     # The next one is taken before the last is given up; they keep all slots.
                     "while one is taken": v[-1] / state * (2 if n == "planaria" else 1)}
                    for n, v in values.items()
                ],
            ))  # fmt: skip
            if PEER in values:
                goals.append(Goal(f"memory while a snapshot is taken: times less than {PEER}",
                                  values[PEER][-1] / (2 * values["planaria"][-1]), 1))  # fmt: skip
            continue
        tables.append(
            (f"{what[0].upper()}{what[1:]}: snapshot of {args.mb} MB a node, {args.ranks} nodes "
             "(measured)", rows_of(turns, "planaria"))
        )  # fmt: skip
        if PEER in values and what in ("stalled", "taken back"):
            goals.append(
                Goal(f"{what}: times less than {PEER}", turns.ratio(PEER, "planaria")["median"], 1)
            )
    publish_tables("memory_peers", tables, settings, goals=goals, failures=missing,
                   started=started)  # fmt: skip


if __name__ == "__main__":
    main()
