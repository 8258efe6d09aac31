"""``planaria plan``: what a set-up would cost and survive, before it is run."""

import math
from typing import TYPE_CHECKING, Any

import typer

from planaria.errors import ConfigError
from planaria.launch import output
from planaria.launch.output import size

if TYPE_CHECKING:
    from planaria.checkpoint.memory.survival import Recovery

app = typer.Typer(
    help="Work out what a set-up costs and survives.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _verbs() -> None:
    """Work out what a set-up costs and survives."""


@app.command("memory")
def memory(
    nodes: int = typer.Option(..., "--nodes", "-n", help="Nodes of the job."),
    losses: int = typer.Option(2, "--losses", "-m", help="Losses that a group should bear."),
    group_size: int = typer.Option(16, "--group-size", "-g", help="Nodes a group."),
    gigabytes: float = typer.Option(64.0, "--gb", help="Bytes of a node's state, in 10^9."),
    mtbf_hours: float = typer.Option(
        6300.0, "--mtbf-hours", help="Mean time between failures of one node."
    ),
    repair_minutes: float = typer.Option(
        10.0, "--repair-minutes", help="Until a lost node is replaced and a snapshot is taken."
    ),
    days: float = typer.Option(30.0, "--days", help="How long the job runs."),
    gbit: float = typer.Option(100.0, "--gbit", help="Each node's link, in 10^9 bits a second."),
    storage_gb: float = typer.Option(
        0.0, "--storage-gb-s", help="Durable storage for all nodes, in 10^9 bytes a second."
    ),
    decode_gb: float = typer.Option(
        8.0, "--decode-gb-s", help="What a node decodes, as 10^9 bytes read a second."
    ),
    racks: int = typer.Option(0, "--racks", help="Racks that the nodes stand in; 0: not known."),
    lost: list[int] = typer.Option([], "--lost", help="Nodes lost at once; may be repeated."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Compare parity in peers' memory with copies: what survives, memory, network, recovery.

    By formulas: nodes fail independently of each other. Nothing is run, and times are simulated.
    The mean time between failures is by default that of a host in the 54 days of Llama 3's
    training: 419 unexpected interruptions of 2048 hosts (arXiv 2407.21783).
    """
    from planaria.checkpoint.memory import survival

    if not (min(gigabytes, gbit, days, decode_gb) > 0 and storage_gb >= 0 and racks >= 0):
        raise ConfigError(
            "--gb, --gbit, --days and --decode-gb-s must be > 0, --storage-gb-s and --racks >= 0"
        )
    plan = survival.erasure(nodes, losses, group_size)
    schemes = [plan]
    for copies in sorted({2, plan.losses + 1} - {1}):
        if copies <= min(nodes, survival.MAX_COPIES):
            schemes.append(survival.replication(nodes, copies))
    half = min(plan.groups) // 2
    if plan.losses and plan.losses < half:
        # What the memory of two copies could bear.
        schemes.append(survival.erasure(nodes, half, max(plan.groups)))
    shown = sorted(set(lost)) or list(range(1, min(nodes, max(2 * plan.losses + 1, 4)) + 1))
    image = gigabytes * 1e9
    times = (days * 24, mtbf_hours, repair_minutes / 60)
    found = [
        _row(survival.Recovery(s, image, gbit * 1e9 / 8, decode_gb * 1e9), shown, times)
        for s in schemes
    ]
    storage = nodes * image / (storage_gb * 1e9) if storage_gb else None
    survived = None
    if racks:
        names = [f"rack {i * racks // nodes}" for i in range(nodes)]
        survived = survival.domains_survived(names, group_size, losses)
    if as_json:
        output.print_json(
            {
                "nodes": nodes, "losses": plan.losses, "group_size": group_size,
                "groups": dict(plan.groups), "image_bytes": image, "mtbf_hours": mtbf_hours,
                "repair_minutes": repair_minutes, "days": days, "link_gbit": gbit,
                "decode_gb_s": decode_gb,
                "racks_survived": survived, "schemes": found,
                "restart_from_storage_s": storage, "label": "simulated",
            }
        )  # fmt: skip
        return 0
    _print(found, shown, days, gbit, image)
    groups = ", ".join(f"{count} of {g}" for g, count in sorted(plan.groups.items()))
    print(f"\ngroups: {groups}; any {plan.losses} nodes may be lost at once, in each of them")
    if plan.losses < losses:
        print(f"too few nodes for groups that bear {losses} losses")
    if survived is not None:
        print(f"{racks} racks: any {survived} of them may be lost as a whole")
    if storage is not None:
        print(f"all nodes from durable storage: {_time(storage)} (simulated)")
    return 0


def _row(
    recovery: "Recovery", shown: list[int], times: tuple[float, float, float]
) -> dict[str, Any]:
    scheme, image = recovery.scheme, recovery.image_nbytes
    return {
        "scheme": scheme.name,
        "survives_any": scheme.losses,
        "memory": scheme.memory,
        "memory_bytes": scheme.memory * image,
        "sent": scheme.network,
        "sent_bytes": scheme.network * image,
        "send_s": scheme.network * image / recovery.link,
        "survives": {str(x): scheme.survives(x) for x in shown},
        "lost_within": scheme.loses_within(*times),
        "recover_by_one_s": recovery.one_reads,
        "recover_by_all_s": recovery.all_read,
    }


def _print(
    found: list[dict[str, Any]], shown: list[int], days: float, gbit: float, image: float
) -> None:
    print(f"a node's state: {size(image)}; per node and snapshot (two of them are kept):\n")
    output.print_table(
        ["scheme", "any losses", "memory", "", "sent", "", f"at {gbit:g} Gbit/s"],
        [
            (
                r["scheme"], r["survives_any"], f"{r['memory']:.3f}x", size(r["memory_bytes"]),
                f"{r['sent']:.2f}x", size(r["sent_bytes"]), _time(r["send_s"]),
            )
            for r in found
        ],
        right=range(1, 7),
    )  # fmt: skip
    print("\nthe probability to survive so many nodes lost at once, and to fail in the run:\n")
    output.print_table(
        ["scheme", *(f"{x} lost" for x in shown), f"fails in {days:g} d"],
        [
            (
                r["scheme"],
                *(_share(r["survives"][str(x)]) for x in shown),
                f"{r['lost_within']:.1e}",
            )
            for r in found
        ],
        right=range(1, len(shown) + 2),
    )
    print("\nto have one lost node's state again (simulated):\n")
    output.print_table(
        ["scheme", "one node in its place", "the others take over"],
        [(r["scheme"], _time(r["recover_by_one_s"]), _time(r["recover_by_all_s"])) for r in found],
        right=(1, 2),
    )


def _share(p: float) -> str:
    """A probability, with as many nines as it has."""
    if p in (0.0, 1.0) or p < 0.99:
        return f"{p:.4g}"
    return f"{p:.{min(12, 2 - math.floor(math.log10(1 - p)))}f}"


def _time(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
