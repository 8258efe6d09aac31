"""The scan on the device finds what the one on the host finds, and moves when that moves.

The CPU is the device here: the code is the same. What needs a GPU is in the last test.
"""

import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from rl_blocks import FLOATS, equal, specials, stepped, weights
from rl_models import bits, holds, nudge, pair, rollout, same, trainer

from planaria.core import points
from planaria.errors import CorruptError, FaultError, SyncError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.bits import FORMATS, BitFormat, tensor_of
from planaria.rl_sync.diff import device
from planaria.rl_sync.diff.device import DeviceScan
from planaria.rl_sync.diff.scan import Scanner
from planaria.rl_sync.versions.history import History

SIZES = (1, 63, 1000, 4097)  # of blocks; of two pieces each, but for the first


def scan_of(blocks: dict[int, np.ndarray], wanted: bool | None = True) -> DeviceScan:
    """A scan of blocks that may be replaced in the dict, as an optimizer would."""

    def live(number: int) -> list[torch.Tensor]:
        tensor = tensor_of(blocks[number])
        cut = tensor.numel() // 3
        return [tensor[:cut], tensor[cut:]] if cut else [tensor]

    return DeviceScan(live, wanted)


@pytest.mark.parametrize("fmt", [*FLOATS, FORMATS["int32"], FORMATS["bool"]], ids=lambda f: f.name)
def test_it_finds_what_the_host_finds(fmt: BitFormat) -> None:
    blocks = {i: weights(fmt, n, i) for i, n in enumerate(SIZES)}
    scan, history = scan_of(blocks), History()
    history.begin(0, {i: b.copy() for i, b in blocks.items()})
    scan.begin(0)
    for version, density in enumerate((0.01, 0.0, 0.1, 1.0, 0.3, 0.02), 1):
        for i, block in blocks.items():
            if density:
                blocks[i] = stepped(fmt, block, density, version)
        before, dense = scan.copied_bytes, sum(b.nbytes for b in blocks.values())
        found = scan.scan(list(blocks), history.newest)
        wanted = {i: Scanner().scan([b], history.newest(i)) for i, b in blocks.items()}
        assert set(found) == set(wanted)
        assert all(equal(found[i], wanted[i]) for i in blocks)
        changed = sum(c.size * (4 + 2 * fmt.width) for c in wanted.values())
        assert scan.copied_bytes - before <= min(changed, dense)
        changes = {i: c for i, c in found.items() if c.size}
        history.commit(version, changes)
        scan.commit(changes)
        assert all(np.array_equal(history.newest(i), b) for i, b in blocks.items())


def payloads(publisher: Publisher, version: int) -> list[bytes]:
    """What goes over for a version, byte by byte."""
    models, entries = publisher._owner.delta(version - 1, version)
    return publisher._owner.read(version - 1, version, range(len(models) + len(entries)))


def published(model: torch.nn.Module, publisher: Publisher, version: int, **more: Any) -> tuple:
    report = publisher.publish(version, **more)
    return report.changed, report.bytes, report.digest, payloads(publisher, version)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_the_same_bytes_go_over(fmt: BitFormat) -> None:
    """With NaNs, -0 and the like, a version that is given up, and a publisher that goes on."""
    model, options = trainer(), {"dtype": fmt.dtype, "codec": "gap_ulp", "block_elements": 700}
    url, more = "tcp://127.0.0.1:0", {"dtype": fmt.dtype, "subscriber": {"timeout": 30.0}}
    with pair(model, codec="gap_ulp", block_elements=700, device_baseline=True, **more) as (
        there, (subscriber,), (served,)
    ), Publisher(model, url, **options) as here:  # fmt: skip
        assert here.publish(0).digest == there.publish(0).digest
        subscriber.update()
        odd = tensor_of(specials(FORMATS["float32"])).view(torch.float32)
        for version, share in ((1, 0.02), (2, 1.0), (3, 0.0), (4, 0.3)):
            nudge(model, version, share=share)
            with torch.no_grad():
                model.mlp[2].bias[version : version + odd.numel()] = odd  # type: ignore[index]
            if version in (2, 4):  # given up, and more changes before it is made up for
                with points.armed("raise=boom@rl.publish.commit"), pytest.raises(FaultError):
                    there.publish(version)
                nudge(model, 10 + version, share=0.05)
            assert published(model, here, version) == published(model, there, version)
            subscriber.update(at_least=version)
            assert same(model, served, fmt.dtype)
        state = there.state_dict()
        assert there.resume(4, state["digest"])  # as after a restart from a checkpoint
        with Publisher(model, url, device_baseline=True, **options) as restarted:
            restarted.load_state_dict(state)
            nudge(model, 5, share=0.02)
            wanted = published(model, here, 5)
            assert wanted == published(model, restarted, 5) == published(model, there, 5)
        assert there._device.copied_bytes > 0
        assert here._device.copied_bytes == 0


def test_it_moves_no_earlier_than_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: it moves as soon as it was scanned; then a version that is given up is lost."""
    scan = DeviceScan.scan

    def eager(self: DeviceScan, *args: Any) -> dict:
        found = scan(self, *args)
        self.commit({number: changes for number, changes in found.items() if changes.size})
        return found

    monkeypatch.setattr(DeviceScan, "scan", eager)
    with pytest.raises((AssertionError, SyncError)):
        test_the_same_bytes_go_over(FORMATS["bfloat16"])


def check_an_optimizer_step_waits(*, gated: bool = True) -> None:
    """A scan that is held until the step waits for it; without a gate, until it is done."""
    model = trainer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pair(model, device_baseline=True) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        held = threading.Event()
        with points.armed(callbacks={"rl.publish.scan": lambda *_: held.wait(30)}):
            nudge(model, 1)
            wanted = bits(model)
            result = publisher.publish_async(1)
            model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
            if gated:
                threading.Timer(0.1, held.set).start()
            optimizer.step()
            held.set()
        assert bits(model) != wanted
        result.result(30)
        subscriber.update(at_least=1)
        assert holds(there, wanted)


def test_an_optimizer_step_waits_for_it() -> None:
    check_an_optimizer_step_waits()


def test_the_gate_is_what_does_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a step that does not wait gets its own changes into the version."""
    monkeypatch.setattr(Publisher, "before_update", lambda _: None)
    with pytest.raises(AssertionError):
        check_an_optimizer_step_waits(gated=False)


def test_a_baseline_that_stayed_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: it does not move with the host's. The publish says so, the next one is right."""
    model = trainer()
    with pair(model, device_baseline=True) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        nudge(model, 1)
        with monkeypatch.context() as patch:
            patch.setattr(DeviceScan, "_move", lambda *_: None)
            publisher.publish(1)
        subscriber.update(at_least=1)
        nudge(model, 2)
        with pytest.raises(SyncError, match="publish once more"):
            publisher.publish(2)
        publisher.publish(2)
        subscriber.update(at_least=2)
        assert same(model, there)


@pytest.mark.parametrize("same_elements", [True, False])
def test_receivers_notice_it_too(same_elements: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the old bits are not compared. By the digest where the positions are right."""
    model = trainer()
    monkeypatch.setattr(DeviceScan, "_move", lambda *_: None)
    monkeypatch.setattr(device, "same_bits", lambda *_: True)
    with pair(model, device_baseline=True, codec="gap_raw") as (publisher, (subscriber,), _):
        publisher.publish(0)
        subscriber.update(at_least=0)
        for version in (1, 2):
            if same_elements:
                with torch.no_grad():
                    model.norm.weight[:5] += 1
            else:
                nudge(model, version, share=0.05)
            publisher.publish(version)
            if version == 1:
                subscriber.update(at_least=1)
        told = "digest" if same_elements else "changed that is not"
        with pytest.raises(CorruptError, match=told):
            subscriber.update(at_least=2, timeout=10)
        assert subscriber.version == 1


def short_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("where", ["_baseline", "_move", "_scanned"])
def test_without_memory_the_host_does_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainer()
    with pair(model, device_baseline=True) as (publisher, (subscriber,), (there,)):
        publisher.publish(0)
        nudge(model, 1)
        with monkeypatch.context() as patch:
            patch.setattr(DeviceScan, where, short_of_memory)
            publisher.publish(1)
        assert not publisher._device._base  # given back
        subscriber.update(at_least=1)
        assert same(model, there)
        copied = publisher._device.copied_bytes
        nudge(model, 2)
        publisher.publish(2)
        subscriber.update(at_least=2)
        assert same(model, there)
        assert publisher._device.copied_bytes == copied  # until the chain begins anew
        publisher.resume(2)
        nudge(model, 3)
        publisher.publish(3)
        assert publisher._device.copied_bytes > copied


def test_by_default_it_is_for_gpus_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {0: weights(FORMATS["bfloat16"], 1000)}
    for wanted in (None, False):
        scan = scan_of(blocks, wanted)
        scan.begin(2000)
        assert scan.scan([0], lambda n: blocks[n]) == {}
    scan = scan_of(blocks, None)
    monkeypatch.setattr(device, "room", lambda _: 3999)
    scan.begin(2000)
    assert not scan._meant(torch.device("cuda", 0))
    monkeypatch.setattr(device, "room", lambda _: 4000)
    assert not scan._meant(torch.device("cuda", 0))  # not tried again before it begins anew
    scan.begin(2000)
    assert scan._meant(torch.device("cuda", 0))
    assert not scan._meant(torch.device("cpu"))


class Stream:
    """A double of a CUDA stream that keeps what is done with it."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def record_event(self) -> str:
        self.said.append(f"{self.name} marked")
        return f"what {self.name} had"

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")


def test_reading_follows_the_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(said, "caller's"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(said, "own"))
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext(said.append(f"on {s.name}")))
    streams = device.Streams()
    streams.mark([torch.device("cpu")])
    with streams.reading():
        assert not streams.marked
        assert said == []
    streams.mark([torch.device("cpu"), gpu])
    assert streams.marked
    reader = threading.Thread(target=lambda: streams.reading().__enter__())
    reader.start()
    reader.join(30)
    assert said == ["caller's marked", "own waits for what caller's had", "on own"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_on_a_gpu(fmt: BitFormat, asynchronous: bool) -> None:
    model = trainer()
    there = rollout(model, fmt.dtype)
    model = model.cuda()
    with (
        torch.cuda.stream(torch.cuda.Stream()),  # not the default one, where it would be in line
        Publisher(model, "tcp://127.0.0.1:0", dtype=fmt.dtype, block_elements=700) as publisher,
        Subscriber(there, publisher.url, timeout=60.0) as subscriber,
    ):
        for version in range(5):
            torch.cuda._sleep(10_000_000)  # a step that is still under way
            with torch.no_grad():
                for p in model.parameters():
                    p += (torch.rand_like(p) < 0.02) * 1e-2 * torch.randn_like(p)
            if asynchronous:
                publisher.publish_async(version)
                publisher.before_update()
            else:
                publisher.publish(version)
            wanted = {k: v.to(fmt.dtype).cpu() for k, v in model.state_dict().items()}
            subscriber.update(at_least=version)
            for name, value in there.state_dict().items():
                assert torch.equal(value.view(torch.uint8), wanted[name].view(torch.uint8))
        dense = publisher.table.dense_bytes()
        assert 0 < publisher._device.copied_bytes < 4 * dense / 2
