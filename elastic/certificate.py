"""What must hold after a change of members, before training goes on: one owner for everything.

Each member says what it holds, as a :class:`Claim`; the claims go to all members, and each of them
calls :func:`certify` on the same ones. It is a pure function, so all come to the same certificate,
or to the same error.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from planaria.errors import CertificateError, ConfigError

#: So many faults of one sort are named in an error, the others counted.
_NAMED = 4


class HasMembers(Protocol):
    """What is asked of a view of the members, see `planaria.elastic.membership`."""

    @property
    def generation(self) -> int:
        """The number of the view."""
        ...

    @property
    def members(self) -> tuple[int, ...]:
        """The ids of all members."""
        ...


@dataclass(frozen=True)
class Claim:
    """What one member says that it holds.

    Things have a kind and a key: ``owns={"block": [0, 3], "slot": ["0.exp_avg"], "stream": [2]}``.
    Keys are compared as text.

    Attributes:
        member: The id of the member.
        generation: The view that it is in.
        step: Steps committed, the same for all.
        owns: Kind -> keys of what it alone owns: blocks, optimizer slots, micro-batches (each the
            stream of its own samples and random numbers).
        shadows: Kind -> keys of what it holds a second copy of.
        same: What all members must say alike: data position, seed, digests of what is replicated.
        digests: Kind -> key -> digest of what it owns or shadows; all that name one must agree.
            May be left out, for all or for some.
    """

    member: int
    generation: int
    step: int
    owns: Mapping[str, Collection[str | int]]
    shadows: Mapping[str, Collection[str | int]] = field(default_factory=dict)
    same: Mapping[str, str | int | None] = field(default_factory=dict)
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The claim as a JSON object."""
        return {
            "member": self.member,
            "generation": self.generation,
            "step": self.step,
            "owns": {kind: list(keys) for kind, keys in self.owns.items()},
            "shadows": {kind: list(keys) for kind, keys in self.shadows.items()},
            "same": dict(self.same),
            "digests": {kind: dict(of_kind) for kind, of_kind in self.digests.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads a claim back.

        Raises:
            ConfigError: It is not one of this version.
        """
        try:
            claim = cls(**data)
            kinds = [(claim.owns, list), (claim.shadows, list), (claim.digests, dict)]
            if not all(isinstance(v, kind) for each, kind in kinds for v in each.values()):
                raise TypeError("a field of another kind")
            if not all(isinstance(n, int) for n in (claim.member, claim.generation, claim.step)):
                raise TypeError("a number is missing")
            return claim
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"not a claim of this version: {error}") from error


@dataclass(frozen=True)
class Certificate:
    """That everything has one owner.

    Attributes:
        generation: The view that it is for.
        step: Steps committed.
        members: The members.
        counts: Kind -> how many things were looked at.
        thin: Kind -> keys of what fewer members shadow than wanted, in order.
        digest: SHA-256 in hexadecimal over the view, all claims and what was expected.
    """

    generation: int
    step: int
    members: tuple[int, ...]
    counts: Mapping[str, int]
    thin: Mapping[str, tuple[str, ...]]
    digest: str


def certify(
    view: HasMembers,
    claims: Sequence[Claim],
    expected: Mapping[str, Collection[str | int]],
    *,
    shadows: Mapping[str, int] | None = None,
) -> Certificate:
    """Checks that each thing has exactly one owner, and that all members agree.

    Args:
        view: The members.
        claims: One of each member, in any order.
        expected: Kind -> keys of all that there is. What nobody may own is not named; kinds that
            are not named may not be claimed.
        shadows: Kind -> how many shadows each of its things should have. Fewer is no error, as they
            are filled in while training goes on: the certificate names them.

    Returns:
        The certificate, equal on all members.

    Raises:
        CertificateError: Names what has no owner or several, what is claimed and does not exist,
            and what members disagree on.
    """
    claims = sorted(claims, key=lambda c: (c.member, json.dumps(c.to_json(), sort_keys=True)))
    keys = {kind: [str(key) for key in of_kind] for kind, of_kind in expected.items()}
    faults = [*_present(view, claims), *_steps(view, claims), *_agreed(claims)]
    thin: dict[str, tuple[str, ...]] = {}
    wanted = shadows or {}
    named = [k for claim in claims for held in (claim.owns, claim.shadows) for k in held]
    for kind in sorted({*named, *keys}):
        owners, copies = _holders(claims, kind, owns=True), _holders(claims, kind, owns=False)
        faults += _owned(kind, keys.get(kind, []), owners, copies)
        few = [k for k in keys.get(kind, []) if len(copies.get(k, ())) < wanted.get(kind, 0)]
        if few:
            thin[kind] = tuple(few)
    faults += _copies(claims)
    if faults:
        raise CertificateError(
            f"generation {view.generation} cannot go on: " + "; ".join(faults)
            + ". Nothing was trained on it; stop, and restore the last committed step."
        )  # fmt: skip
    return Certificate(
        view.generation,
        claims[0].step,
        tuple(view.members),
        {kind: len(of_kind) for kind, of_kind in keys.items()},
        thin,
        _digest(view, claims, keys),
    )


def _present(view: HasMembers, claims: Sequence[Claim]) -> Iterator[str]:
    said = [claim.member for claim in claims]
    missing = sorted(set(view.members) - set(said))
    strangers = sorted(set(said) - set(view.members))
    twice = sorted({member for member in said if said.count(member) > 1})
    if not view.members:
        yield "there are no members"
    if missing:
        yield f"no claim of member {_list(missing)}"
    if strangers:
        yield f"claims of {_list(strangers)}, which are no members"
    if twice:
        yield f"several claims of member {_list(twice)}"


def _steps(view: HasMembers, claims: Sequence[Claim]) -> Iterator[str]:
    old = [claim.member for claim in claims if claim.generation != view.generation]
    if old:
        yield f"claims of another generation, of member {_list(old)}"
    yield from _differing("the committed step", {c.member: c.step for c in claims})


def _agreed(claims: Sequence[Claim]) -> Iterator[str]:
    for name in sorted({name for claim in claims for name in claim.same}):
        values = {c.member: c.same.get(name, "(not said)") for c in claims}
        yield from _differing(name, values)


def _differing(name: str, values: Mapping[int, Any]) -> Iterator[str]:
    sides: dict[str, list[int]] = {}
    for member, value in values.items():
        sides.setdefault(json.dumps(value), []).append(member)
    if len(sides) > 1:
        told = ", ".join(f"{value} by {_list(m)}" for value, m in list(sides.items())[:_NAMED])
        yield f"members disagree on {name}: {told}"


def _holders(claims: Sequence[Claim], kind: str, *, owns: bool) -> dict[str, list[int]]:
    """For each key of a kind the members that own it, or else that shadow it."""
    found: dict[str, list[int]] = {}
    for claim in claims:
        for key in (claim.owns if owns else claim.shadows).get(kind, ()):
            found.setdefault(str(key), []).append(claim.member)
    return found


def _owned(
    kind: str,
    keys: Sequence[str],
    owners: Mapping[str, Sequence[int]],
    copies: Mapping[str, Sequence[int]],
) -> Iterator[str]:
    known = set(keys)
    if len(known) != len(keys):
        yield f"{kind}s are expected twice"
    none = [key for key in keys if key not in owners]
    several = [f"{k} (members {_list(m)})" for k, m in owners.items() if len(m) > 1]
    strange = sorted({*owners, *copies} - known)
    both = [k for k, m in copies.items() if set(m) & set(owners.get(k, ())) or len(set(m)) < len(m)]
    for keyed, says in (
        (none, "without an owner"),
        (several, "with several owners"),
        (strange, "that do not exist"),
        (both, "shadowed twice by one member, or by the owner itself"),
    ):
        if keyed:
            yield f"{kind}s {says}: {_list(keyed)}"


def _copies(claims: Sequence[Claim]) -> Iterator[str]:
    """Copies whose digests differ, and digests of what a member does not hold."""
    seen: dict[tuple[str, str], dict[int, str]] = {}
    for claim in claims:
        for kind, of_kind in claim.digests.items():
            held = {str(k) for by in (claim.owns, claim.shadows) for k in by.get(kind, ())}
            not_held = sorted(set(of_kind) - held)
            if not_held:
                yield f"digests by member {claim.member} of {kind}s not held: {_list(not_held)}"
            for key, digest in of_kind.items():
                seen.setdefault((kind, key), {})[claim.member] = digest
    wrong = [
        f"{kind} {key} (members {_list(list(by))})"
        for (kind, key), by in sorted(seen.items())
        if len(set(by.values())) > 1
    ]
    if wrong:
        yield f"copies differ: {_list(wrong)}"


def _list(items: Sequence[Any]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(map(str, items[:_NAMED])) + more


def _digest(view: HasMembers, claims: Sequence[Claim], keys: Mapping[str, Sequence[str]]) -> str:
    held = [
        {**c.to_json(), **{
            name: {kind: sorted(map(str, of_kind)) for kind, of_kind in getattr(c, name).items()}
            for name in ("owns", "shadows")
        }}
        for c in claims
    ]  # fmt: skip
    all_of_it = [view.generation, list(view.members), held, keys]
    return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()
