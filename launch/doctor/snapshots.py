"""Snapshot processes of this user on this machine: which live, and what crashes left of them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.runtime import Info, Place, places, runtime_folder
from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.errors import ConfigError, PlanariaError
from planaria.launch.doctor import NOTE, OK, WRONG, Finding
from planaria.launch.output import size

_ANSWER_S = 10.0
#: A job that is being started again is back by then.
_ALONE_S = 30.0


def snapshots(run: Path, *, clean: bool = False) -> Iterator[Finding]:
    """Looks at the runtime folder.

    Args:
        run: A run's folder, whose token opens its processes.
        clean: Whether to remove what is dead, and to end what nobody has used for a while.
    """
    found = places()
    for place in found:
        info = place.info()
        if info is not None and info.alive:
            yield _live(place, info, run, clean)
        else:
            yield _dead(place, clean)
    if not found:
        yield Finding("snapshots", OK, f"no snapshot process, nor what is left of one, in "
                      f"{runtime_folder()}")  # fmt: skip


def _live(place: Place, info: Info, run: Path, clean: bool) -> Finding:
    what = f"snapshot process {info.process.pid} of node {info.node}, for {info.root or info.job}"
    facts: dict[str, Any] = {"pid": info.process.pid, "node": info.node, "root": info.root}
    try:
        status = _ask(place, run, clean)
    except (PlanariaError, OSError) as error:
        text = f"{what}, does not answer ({error}); if its job is gone, end it by hand"
        return Finding("snapshots", WRONG, text, facts)
    if status is None:
        return Finding("snapshots", NOTE, f"{what}: its job's token is not known here", facts)
    facts |= {"used_bytes": status["used"], "ranks": status["ranks"]}
    what += f", holds {size(status['used'])}"
    if status["ranks"]:
        return Finding("snapshots", OK, f"{what}, serves {', '.join(status['ranks'])}", facts)
    if status.get("ended"):
        return Finding("snapshots", OK, f"ended {what}", facts)
    text = f"{what}; no rank since {status['alone_s']:.0f} s: it ends by itself, or by --clean"
    return Finding("snapshots", NOTE, text, facts)


def _ask(place: Place, run: Path, clean: bool) -> dict[str, Any] | None:
    """What a process says of itself; it is ended if nobody has used it for a while."""
    for token in _tokens(place, run):
        try:
            client = NodeClient(place, token, "doctor", Deadline(_ANSWER_S), watches=True)
        except ConfigError:
            continue
        except PlanariaError as error:
            if "token" in str(error):
                continue
            raise
        with contextlib.closing(client):
            status = client.status(_ANSWER_S)
            if clean and not status["ranks"] and status["alone_s"] > _ALONE_S:
                client.stop()
                until = Deadline(_ANSWER_S)
                while (info := place.info()) is not None and info.alive:
                    until.check("the end of a snapshot process")
                    time.sleep(0.05)
                status["ended"] = True
            return status
    return None


def _tokens(place: Place, run: Path) -> Iterator[bytes]:
    """The tokens that may open it: the environment's, the job's own, those of runs."""
    for folder in (None, place.token.parent, run, *(p.parent for p in run.glob("*/token"))):
        with contextlib.suppress(ConfigError):
            token = load_token(folder)
            if token is not None:
                yield token


def _dead(place: Place, clean: bool) -> Finding:
    what = f"{place.path} of a snapshot process that is dead"
    if not clean:
        return Finding("snapshots", WRONG, f"{what}: --clean removes it")
    try:
        with place.locked(Deadline(_ANSWER_S)):
            info = place.info()
            if info is None or not info.alive:
                place.clear()
    except PlanariaError as error:
        return Finding("snapshots", WRONG, f"{what}, and was not removed: {error}")
    return Finding("snapshots", OK, f"removed {what}")
