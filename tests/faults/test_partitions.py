"""A network that falls apart between two nodes of a real run, each in a namespace of its own."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import PLANARIA, TINY, finish, planaria, started, wait_until

from planaria.launch import elastic_events, metrics
from planaria.launch.run_folder import RunFolder

TOKEN = "0123456789abcdef0123"
HOSTS = ("10.213.77.1", "10.213.77.2")
SESSION = [
    "elastic=session", "elastic.hang_s=8", "elastic.recovery_s=30", "elastic.policy=shrink",
    "elastic.max_world=3", *TINY, "data.batch_size=8",
]  # fmt: skip


class Network:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"pl{os.getpid()}{side}" for side in "ab"]

    def command(self, node: int, command: list[str]) -> list[str]:
        """What runs a command on a node."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", self.names[0], "down")


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("namespaces are made by root, with ip")
    net = Network()
    one, two = net.names
    with contextlib.ExitStack() as stack:
        try:
            for name in net.names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
            # Made in a namespace: the machine's own has no part in it.
            _ip("-n", one, "link", "add", one, "type", "veth", "peer", "name", two, "netns", two)
            for name, host in zip(net.names, HOSTS, strict=True):
                _ip("-n", name, "addr", "add", f"{host}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no namespaces here: {error.stderr}")
        yield net


@pytest.mark.soak
def test_only_the_side_with_a_quorum_goes_on(tmp_path: Path, network: Network) -> None:
    planaria(tmp_path, "run", "--run", "reference", "-n", "2", *SESSION, "steps=60")
    one, two = tmp_path / "one", tmp_path / "two"
    slow = {"PLANARIA_FAULTS": "sleep=0.2@demo.step:times=inf", "PLANARIA_TOKEN": TOKEN}
    first = network.command(0, [
        *PLANARIA, "run", "--run", str(one), "-n", "2", "--json", "--reference", "reference",
        *SESSION, "steps=60", f"elastic.host={HOSTS[0]}",
    ])  # fmt: skip
    with started(first, tmp_path, GLOO_SOCKET_IFNAME=network.names[0], **slow) as process:
        wait_until(lambda: steps_of(one) >= 2, "the first steps")
        address = RunFolder(one).address.read_text().strip()
        second = network.command(1, [
            *PLANARIA, "run", "--run", str(two), "--join", address, "-n", "1",
            f"elastic.host={HOSTS[1]}",
        ])  # fmt: skip
        with started(second, tmp_path, GLOO_SOCKET_IFNAME=network.names[1], **slow) as other:
            wait_until(lambda: members(one)[-1:] == [3], "the rank of the other node")
            at = steps_of(one)
            wait_until(lambda: steps_of(one) > at + 2, "steps on three ranks")
            network.cut()
            wait_until(lambda: members(one)[-1] == 2, "the quorum's side to go on")
            ended, lost = finish(process), finish(other)
    assert ended.code == 0, ended.err + ended.out
    summary = ended.json()
    assert (summary["compared"], summary["identical"]) == (60, 60)
    assert lost.code not in (0, None), lost.err + lost.out
    assert "quorum" in lost.err + lost.out
    assert steps_of(two) < 60


def steps_of(folder: Path) -> int:
    return max((r.step for r in metrics.read(RunFolder(folder).metrics)), default=0)


def members(folder: Path) -> list[int]:
    events = elastic_events.read(RunFolder(folder).elastic)
    return [len(e["members"]) for e in events if e["kind"] == elastic_events.GENERATION]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=60)
