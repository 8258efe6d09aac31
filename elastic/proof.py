"""What a member claims to hold, and the certificate that a generation begins with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planaria.elastic.certificate import Certificate, Claim, certify
from planaria.elastic.membership.view import View
from planaria.elastic.replicated import Replicated, digest_tensor
from planaria.elastic.updates import BlockUpdater, ReplicaUpdater

#: Elements of a tensor that a digest of samples looks at, evenly spread; copies that differ because
#: an update was made on one alone differ in nearly all.
SAMPLE = 1024
#: Models of so many bytes have every byte looked at: that takes some hundredths of a second.
FULL_BYTES = 64 << 20
#: Of larger ones so many generations, the others samples.
FULL_EVERY = 8


@dataclass(frozen=True)
class _Members:
    generation: int
    members: tuple[int, ...]


def make_claim(
    view: View,
    step: int,
    updater: BlockUpdater | ReplicaUpdater,
    micro_batches: Sequence[int],
    replicated: Replicated,
) -> Claim:
    """What this member holds, computes, and believes that all have alike."""
    placement = updater.placement
    # The same on all members: what they compare must be made alike.
    size = sum(block.nbytes for block in updater.blocks)
    count = None if size <= FULL_BYTES or view.generation % FULL_EVERY == 0 else SAMPLE
    owned = placement.partition.of(view.me)
    shadowed = sorted(set(placement.of(view.me)) - set(owned))
    digests: dict[str, str] = {}
    if isinstance(updater, BlockUpdater):
        for index in (*owned, *shadowed):
            digests[str(index)] = _digest(updater.sharded.export(index), count)
    return Claim(
        view.me,
        view.generation,
        step,
        owns={"block": owned, "stream": list(micro_batches)},
        shadows={"block": shadowed},
        same={"position": step, "parameters": replicated.sample(count)},
        digests={"block": digests} if digests else {},
    )


def certify_members(
    view: View,
    members: Sequence[int],
    claims: Sequence[Claim],
    updater: BlockUpdater | ReplicaUpdater,
    micro_batches: int,
) -> Certificate:
    """Certifies that each block and micro-batch has one owner among those that take part.

    Raises:
        CertificateError: It is not so; names what is wrong.
    """
    expected = {"block": range(len(updater.blocks)), "stream": range(micro_batches)}
    return certify(_Members(view.generation, tuple(members)), claims, expected)


def _digest(state: dict[str, Any], count: int | None) -> str:
    import torch

    found = hashlib.blake2b(digest_size=8)
    for slot, value in sorted(state.items()):
        found.update(slot.encode())
        found.update(digest_tensor(value, count) if isinstance(value, torch.Tensor)
                     else repr(value).encode())  # fmt: skip
    return found.hexdigest()
