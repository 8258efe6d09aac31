"""Which codec `auto` takes: never one by which a version is there much later than by another."""

import numpy as np
import pytest
from rl_blocks import drifted, job

from planaria.errors import ConfigError
from planaria.rl_sync.bits import FORMATS
from planaria.rl_sync.codecs.base import Codec
from planaria.rl_sync.codecs.registry import all_codecs
from planaria.rl_sync.diff.scan import Changes
from planaria.rl_sync.transports.feed import Ack
from planaria.rl_sync.versions import choice as choice_module
from planaria.rl_sync.versions.choice import CodecChoice, Learnt, Times
from planaria.rl_sync.versions.log import VersionLog
from planaria.rl_sync.versions.speeds import DECODING, ENCODING, Speeds, cost

BF16 = FORMATS["bfloat16"]
N, GROUP, BLOCKS = 1 << 18, 16, 192


@pytest.fixture(scope="module")
def block() -> tuple[np.ndarray, Changes, dict[str, Codec]]:
    """A block, what changed in it, and codecs that have seen such blocks."""
    base, live = drifted(N)
    codecs = all_codecs()
    one = job(BF16, base, live)
    for codec in codecs.values():
        codec.encode([one])
    return base, one.changes, codecs


def planned(choice: CodecChoice, changes: Changes, threads: int) -> list[list[str]]:
    """What a version of many such blocks goes in, by group."""
    nbytes = N * BF16.width
    choice.begin(threads, BLOCKS * nbytes)
    groups = []
    for _ in range(BLOCKS // GROUP):
        choice.look(GROUP * nbytes)
        groups.append([choice.pick(BF16, N, changes) for _ in range(GROUP)])
    return groups


def takes(groups: list[list[str]], times: dict[str, Times], threads: int, scan: float) -> float:
    """When a version is there: groups go through encoder, link and decoder as a whole."""
    encoders, sent, decoded, cores = [0.0] * threads, 0.0, 0.0, 0.0
    for group in groups:
        first = encoders.index(min(encoders))
        encoders[first] += scan * threads * GROUP + sum(times[n].encoding for n in group) * threads
        sent = max(sent, encoders[first]) + sum(times[n].sending for n in group)
        decoded = max(decoded, sent) + sum(times[n].decoding for n in group)
        cores += sum(times[n].cores for n in group)
    return max(decoded, cores)


@pytest.mark.parametrize("here", [0, 1])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("slower", [1.0, 1.3])
def test_no_fixed_codec_is_much_faster(
    here: int, threads: int, slower: float, block: tuple[np.ndarray, Changes, dict[str, Codec]]
) -> None:
    """Also where decoding really takes longer than receivers said."""
    _, changes, codecs = block
    mixed = 0
    for link in (1e5, 1e6, 3e6, 6e6, 12.5e6, 25e6, 125e6, 1e9, 1e11):
        choice = CodecChoice(codecs)
        choice.learn(Learnt(link, {}, here))
        groups = planned(choice, changes, threads)
        times = {
            name: t._replace(decoding=t.decoding * slower / choice_module._UNSURE)
            for name, t in choice.times(BF16, N, changes).items()
        }
        scan = choice_module._SCANNING * N * BF16.width / threads
        best = min(
            takes([[name] * GROUP] * (BLOCKS // GROUP), times, threads, scan) for name in times
        )
        assert takes(groups, times, threads, scan) <= 1.05 * best, link
        mixed += len({name for group in groups for name in group}) > 1
    assert mixed


def test_the_choice_follows_link_and_density(
    block: tuple[np.ndarray, Changes, dict[str, Codec]],
) -> None:
    base, sparse, codecs = block
    dense = job(BF16, base, (base + 1).astype(np.uint16)).changes
    choice = CodecChoice(codecs)
    choice.link = 1e6
    assert choice.pick(BF16, base.size, sparse) == "exponent"
    choice.link = 1e10
    assert choice.pick(BF16, base.size, sparse) in ("gap_raw", "gap_ulp")
    assert choice.pick(BF16, base.size, dense) == "dense"
    assert CodecChoice(codecs, "bitmap").pick(BF16, base.size, sparse) == "bitmap"
    with pytest.raises(ConfigError, match="zip"):
        CodecChoice(codecs, "zip")


@pytest.mark.parametrize("link", [1e5, 1e8, 1e12])
def test_nothing_is_sent_as_more_than_it_is(link: float) -> None:
    fmt = FORMATS["float32"]
    base = np.arange(1 << 12, dtype=np.uint32)
    changes = job(fmt, base, base + np.uint32(1 << 20)).changes
    choice = CodecChoice(all_codecs())
    choice.link = link
    for _ in range(5):
        choice.encoding.note("dense", base.nbytes, base.size, 10.0)  # however slow it was
    choice.begin()
    name = choice.pick(fmt, base.size, changes)
    model, (data,) = all_codecs()[name].encode([job(fmt, base, base + np.uint32(1 << 20))])
    assert len(model) + len(data) <= base.nbytes


def test_what_receivers_say_changes_the_choice(
    block: tuple[np.ndarray, Changes, dict[str, Codec]],
) -> None:
    _, changes, codecs = block
    table = VersionLog.__new__(VersionLog)  # only what it knows of receivers is looked at
    VersionLog.__init__(table, None, [], None)  # type: ignore[arg-type]
    found = []
    for ratio in (1.0, 8.0):
        acks = [
            Ack(f"w{i}", 0, 1, "", link=12.5e6, host="elsewhere", decoding={"exponent": ratio})
            for i in range(3)
        ]
        for ack in acks:
            table.acknowledge(Ack.from_json(ack.to_json()), None)  # type: ignore[arg-type]
        choice = CodecChoice(codecs)
        choice.learn(table.learnt())
        assert choice.link == 12.5e6
        groups = planned(choice, changes, 4)
        found.append(sum(group.count("exponent") for group in groups))
    assert found[1] < found[0] / 3


def test_speeds_are_learnt_and_forgotten() -> None:
    speeds = Speeds(ENCODING)
    usual = cost(ENCODING["exponent"], 1 << 20, 1000)
    speeds.note("exponent", 1 << 20, 1000, 1000 * usual)  # it was compiled meanwhile
    assert speeds.ratio("exponent") == 1.0
    for _ in range(30):
        speeds.note("exponent", 1 << 20, 1000, 4 * usual)
    assert speeds.ratio("exponent") == pytest.approx(4.0)
    assert speeds.ratio("bitmap") == pytest.approx(4.0)  # a slow machine, as far as is known
    for _ in range(30):
        speeds.note("dense", 1 << 22, 1000, cost(ENCODING["dense"], 1 << 22, 1000))
    for _ in range(100):
        speeds.fade()
    assert speeds.ratio("exponent") < 3.0  # worth another try
    assert set(DECODING) == set(ENCODING) == set(all_codecs())
