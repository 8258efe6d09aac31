"""Nothing goes on after a change of members before everything has exactly one owner."""

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic.certificate import Claim, certify
from planaria.errors import CertificateError, ConfigError


@dataclass(frozen=True)
class View:
    generation: int
    members: tuple[int, ...]


@st.composite
def sound(draw: st.DrawFn) -> tuple[View, list[Claim], dict[str, list[int]]]:
    """A view with claims that are in order: each thing has one owner, and one shadow elsewhere."""
    members = draw(st.lists(st.integers(0, 20), min_size=2, max_size=5, unique=True))
    view = View(draw(st.integers(1, 9)), tuple(sorted(members)))
    expected = {kind: list(range(draw(st.integers(1, 8)))) for kind in ("block", "stream")}
    claims = []
    owner = {(k, i): draw(st.sampled_from(view.members)) for k in expected for i in expected[k]}
    shadow = {
        i: draw(st.sampled_from([m for m in view.members if m != owner["block", i]]))
        for i in expected["block"]
    }
    for me in view.members:
        owns = {k: [i for i in expected[k] if owner[k, i] == me] for k in expected}
        second = [i for i, holder in shadow.items() if holder == me]
        digests = {str(i): f"d{i}" for i in [*owns["block"], *second]}
        claims.append(
            Claim(me, view.generation, 7, owns, {"block": second}, {"position": 70},
                  {"block": digests})
        )  # fmt: skip
    return view, draw(st.permutations(claims)), expected


@given(sound())
def test_what_is_in_order_is_certified_alike_by_all(case: tuple) -> None:
    view, claims, expected = case
    made = certify(view, claims, expected, shadows={"block": 1})
    assert (made.generation, made.members, made.step) == (view.generation, view.members, 7)
    assert not made.thin
    again = [Claim.from_json(json.loads(json.dumps(c.to_json()))) for c in reversed(claims)]
    assert certify(view, again, expected, shadows={"block": 1}) == made


@given(sound(), st.data())
def test_any_single_fault_is_noticed(case: tuple, data: st.DataObject) -> None:
    view, claims, expected = case
    n = data.draw(st.integers(0, len(claims) - 1))
    claim, kind = claims[n], data.draw(st.sampled_from(sorted(expected)))
    mine = list(claim.owns[kind])
    others = [i for i in expected[kind] if i not in mine]
    faults = {
        "several": others[:1] and {"owns": {**claim.owns, kind: mine + others[:1]}},
        "none": mine and {"owns": {**claim.owns, kind: mine[1:]}},
        "strange": {"owns": {**claim.owns, kind: [*mine, 99]}},
        "another kind": {"owns": {**claim.owns, "expert": [0]}},
        "step": {"step": 8},
        "generation": {"generation": view.generation + 1},
        "position": {"same": {"position": 71}},
        "not said": {"same": {}},
        "who": {"member": 99},
        "own shadow": claim.owns["block"] and {"shadows": {"block": claim.owns["block"]}},
        "twice": mine and {"owns": {**claim.owns, kind: [*mine, mine[0]]}},
        "digest": claim.digests["block"]
        and {"digests": {"block": dict.fromkeys(claim.digests["block"], "other")}},
        "not held": {"digests": {"stream": {"99": "d"}}},
    }
    changed = data.draw(st.sampled_from([f for f in faults.values() if f]))
    claims[n] = replace(claim, **changed)
    with pytest.raises(CertificateError, match="cannot go on"):
        certify(view, claims, expected)


def claim(member: int, owns: list[int], shadows: list[int] | None = None) -> Claim:
    return Claim(member, 2, 5, {"block": owns}, {"block": shadows or []}, {"position": 1})


def test_the_error_says_what_is_wrong() -> None:
    view = View(2, (0, 3))
    with pytest.raises(CertificateError) as caught:
        certify(view, [claim(0, [0, 1]), claim(3, [1, 2])], {"block": range(9)})
    said = str(caught.value)
    assert "blocks without an owner: 3, 4, 5, 6 and 2 more" in said
    assert "blocks with several owners: 1 (members 0, 3)" in said
    with pytest.raises(CertificateError, match="no claim of member 3"):
        certify(view, [claim(0, [0])], {"block": [0]})
    with pytest.raises(CertificateError, match=r"position: 1 by 0, 2 by 3"):
        certify(
            view, [claim(0, [0]), replace(claim(3, [1]), same={"position": 2})], {"block": [0, 1]}
        )


def test_missing_shadows_are_told_not_refused() -> None:
    view = View(2, (0, 3))
    made = certify(
        view, [claim(0, [0], [1]), claim(3, [1])], {"block": [0, 1]}, shadows={"block": 1}
    )
    assert made.thin == {"block": ("0",)}


def test_a_copy_that_differs_is_noticed() -> None:
    held = [
        replace(claim(m, [m], [1 - m]), digests={"block": {"0": f"d{m}", "1": "same"}})
        for m in (0, 1)
    ]
    with pytest.raises(CertificateError, match=r"copies differ: block 0 \(members 0, 1\)"):
        certify(View(2, (0, 1)), held, {"block": [0, 1]})


def test_no_claims_certify_nothing() -> None:
    with pytest.raises(CertificateError, match="no members"):
        certify(View(1, ()), [], {})


@pytest.mark.parametrize("bad", [{}, {"member": 1}, {**claim(0, [0]).to_json(), "owns": {"b": 3}}])
def test_a_malformed_claim_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="not a claim"):
        Claim.from_json(bad)


def test_many_blocks_are_certified() -> None:
    n, members = 100_000, 64
    claims = [
        Claim(m, 1, 0, {"block": range(m, n, members), "slot": range(3 * m, 3 * n, 3 * members)},
              {"block": range((m + 1) % members, n, members)})
        for m in range(members)
    ]  # fmt: skip
    expected = {"block": range(n), "slot": range(0, 3 * n, 3)}
    made = certify(View(1, tuple(range(members))), claims, expected, shadows={"block": 2})
    assert made.counts == {"block": n, "slot": n}
    assert len(made.thin["block"]) == n
