"""What ranks that meet anew make of what each of them knows; and whose lock is free at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.checkpoint.past import Past, merged
from planaria.checkpoint.storage import lock as lock_module
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.lock import RootLock
from planaria.errors import RootLockedError

PASTS = st.builds(
    Past,
    goes_on=st.booleans(),
    newest_at_open=st.none() | st.integers(0, 9),
    restored=st.none() | st.integers(0, 9),
    owes=st.booleans(),
    stopping=st.booleans(),
    locks=st.lists(st.sampled_from("abc"), unique=True),
)


@given(st.lists(PASTS, min_size=1, max_size=4))
def test_what_one_knows_all_know(pasts: list[Past]) -> None:
    together = merged(pasts)
    for past in pasts:
        assert together.goes_on >= past.goes_on
        assert together.owes >= past.owes
        assert together.stopping >= past.stopping
        assert set(together.locks) >= set(past.locks)
        assert past.newest_at_open is None or (together.newest_at_open or 0) >= past.newest_at_open
        # Who has seen the first commit after a restore has seen it for all.
        assert past.restored is not None or together.restored is None
    assert Past.from_json(json.loads(json.dumps(together.to_json()))) == together
    assert merged([together]) == together


def test_who_joins_knows_nothing() -> None:
    assert merged([]) == Past()


def another_host(root: Path) -> str:
    """A lease that a vanished host has left; its mark."""
    lease = {"nonce": "theirs", "host": "elsewhere", "process": [1, 1, "b", "elsewhere"],
             "renewals": 7, "lease_s": 30.0}  # fmt: skip
    (root / "lock.json").write_text(json.dumps(lease))
    return "theirs"


def test_the_lock_of_who_is_known_to_be_dead_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = another_host(tmp_path)

    def waits(seconds: float) -> None:
        raise TimeoutError

    # The lock's alone: other threads of this process may be waiting for something.
    monkeypatch.setattr(lock_module, "time", SimpleNamespace(sleep=waits))
    with pytest.raises(TimeoutError):  # without proof its lease is waited for
        RootLock(LocalStorage(tmp_path))
    with pytest.raises(TimeoutError):
        RootLock(LocalStorage(tmp_path), heir_of=["another"])
    lock = RootLock(LocalStorage(tmp_path), heir_of=["another", mark])
    lock.check()
    # Should it live after all, it must not commit any more.
    taken = json.loads((tmp_path / "lock.json").read_text())
    assert taken["nonce"] == lock.mark != mark
    another_host(tmp_path)
    with pytest.raises(RootLockedError):
        lock.check()
    lock.release()
