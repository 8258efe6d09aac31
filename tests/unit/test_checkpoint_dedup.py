"""Content addressing: what has not changed is referred to, kept as long as needed, and verified."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import data_files, flip, held, load_once, must_notice, save_once, signed
from fault_job import CHUNK_NBYTES, settle
from mixture import ALL_NBYTES as ALL
from mixture import (
    BASE,
    EXPERT,
    HEAD,
    SMALL,
    Mixture,
    begin,
    check_stored,
    orphans,
    save,
    states,
)

from planaria.checkpoint import Checkpointer, KeepLast, open_checkpoint, unchanged
from planaria.checkpoint.capture import packing
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.layout.plan import pieces
from planaria.checkpoint.prune import choose, prune
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.box import Box
from planaria.errors import ConfigError, CorruptError, SaveFailedError
from planaria.launch.cli import main


def check_unchanged_is_not_written(path: Path) -> None:
    model, saved = Mixture(), {}
    with begin(path, model) as ckpt:
        first, saved[1] = save(ckpt, model, 1)
        model.touch(3)
        second, saved[2] = save(ckpt, model, 2)
        model.touch()
        third, saved[3] = save(ckpt, model, 3)
    assert ALL <= first <= ALL + SMALL
    assert EXPERT + HEAD <= second <= EXPERT + HEAD + SMALL
    assert HEAD <= third <= HEAD + SMALL
    check_stored(path, saved)
    for step, expected in saved.items():
        again = Mixture()
        again.touch(*range(8), base=5)
        load_once(path, again.state, step=step)
        assert all(torch.equal(again.copy()[n], v) for n, v in expected.items())
    manifest = open_checkpoint(path, 3).manifest
    # Where the bytes are, never by way of another step's reference.
    assert sorted(f.step or 3 for f in manifest.files) == [1, 2, 3]
    assert manifest.nbytes + manifest.referenced_nbytes < 2 * ALL


def test_unchanged_is_not_written(tmp_path):
    check_unchanged_is_not_written(tmp_path)


def test_the_handle_and_telemetry_tell_what_was_saved(tmp_path):
    model = Mixture()
    with begin(tmp_path, model) as ckpt:
        save(ckpt, model, 1)
        model.touch()
        handle = ckpt.save(2)
        handle.wait_committed()
    assert handle.referenced_nbytes >= ALL - HEAD
    assert open_checkpoint(tmp_path, 2).manifest.referenced_nbytes == handle.referenced_nbytes


def test_what_was_changed_back_is_not_taken_for_unchanged(tmp_path):
    model, saved = Mixture(), {}
    with begin(tmp_path, model) as ckpt:
        for step, base in enumerate([0.0, 1.0, -1.0, 0.0], start=1):
            model.touch(base=base)
            nbytes, saved[step] = save(ckpt, model, step)
            assert (nbytes > BASE) == (base != 0 or step == 1)
    check_stored(tmp_path, saved)


def test_a_restarted_run_goes_on_with_what_it_restored(tmp_path):
    model = Mixture()
    with begin(tmp_path, model) as ckpt:
        _, expected = save(ckpt, model, 1)
    again = Mixture()
    again.touch(*range(8), base=1)
    with begin(tmp_path, again) as ckpt:
        ckpt.restore()
        again.touch(0)
        nbytes, later = save(ckpt, again, 2)
    assert nbytes <= EXPERT + HEAD + SMALL
    check_stored(tmp_path, {1: expected, 2: later})


def check_keeping_one(path: Path) -> None:
    """The file of the first step stays as long as the base in it is wanted."""
    model = Mixture()
    with begin(path, model, keep=1) as ckpt:
        for step in (1, 2, 3):
            model.touch(step)
            _, saved = save(ckpt, model, step)
            check_stored(path, {step: saved})
        assert states(path)[1] == "referenced"
        assert ckpt.all_steps() == [3]
        model.touch(*range(8), base=1)
        _, saved = save(ckpt, model, 4)
    check_stored(path, {4: saved})
    assert states(path) == {4: "committed"}
    assert not orphans(path)


def test_keeping_one_step_keeps_what_it_needs(tmp_path):
    check_keeping_one(tmp_path)


def test_a_file_of_which_little_is_wanted_is_given_up(tmp_path):
    model = Mixture()
    with begin(tmp_path, model, keep=1) as ckpt:
        save(ckpt, model, 1)
        model.touch(*range(7), base=1)  # all but the last expert
        save(ckpt, model, 2)
        assert states(tmp_path) == {1: "referenced", 2: "committed"}
        model.touch()
        nbytes, saved = save(ckpt, model, 3)
    assert EXPERT + HEAD <= nbytes <= EXPERT + HEAD + SMALL
    assert states(tmp_path) == {2: "referenced", 3: "committed"}
    check_stored(tmp_path, {3: saved})


def test_the_parts_of_many_files_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "MOST_FILES", 3)
    model, most, saved = Mixture(), 0, {}
    with begin(tmp_path, model, keep=1) as ckpt:
        for step in range(1, 17):
            model.touch(step % 8)
            _, saved = save(ckpt, model, step)
            most = max(most, len(open_checkpoint(tmp_path, step).manifest.files))
    assert most == 5  # one more than 3, and its own
    check_stored(tmp_path, {16: saved})
    assert not orphans(tmp_path)


def test_saves_that_overlap_refer_to_what_is_still_there(tmp_path):
    model, saved = Mixture(), {}
    with begin(tmp_path, model, keep=1) as ckpt:
        save(ckpt, model, 1)
        with held("checkpoint.manifest.begin") as hold:
            for step in (2, 3, 4):
                ckpt.before_update()
                model.touch(step, base=1.0 if step == 2 else -1.0 if step == 3 else 0.0)
                last = ckpt.save(step)
                saved[step] = model.copy()
            hold.wait_reached()
            last.wait_captured()  # so that all refer to the first
        last.wait_committed()
        assert last.referenced_nbytes
    check_stored(tmp_path, {4: saved[4]})
    assert not orphans(tmp_path)


def check_next_refers(path: Path) -> None:
    """A save that follows at once, old steps being removed still, refers to the one before."""
    model, saved = Mixture(), {}
    with begin(path, model, keep=1) as ckpt:
        for step in (1, 3):
            with held("checkpoint.retention.begin") as hold:
                ckpt.save(step).wait_committed()
                hold.wait_reached()
                model.touch()
                following = ckpt.save(step + 1)
                following.wait_captured()
                saved[step + 1] = model.copy()
                model.touch()
            following.wait_committed()
            settle(ckpt)
            assert following.referenced_nbytes >= ALL - HEAD - SMALL
    check_stored(path, {4: saved[4]})
    assert not orphans(path)


def test_a_save_that_follows_at_once_refers_to_the_one_before(tmp_path):
    check_next_refers(tmp_path)


def test_a_step_that_is_saved_again_keeps_what_others_use(tmp_path):
    model, saved = Mixture(), {}
    with begin(tmp_path, model) as ckpt:
        for step in (1, 2, 3, 1, 4):
            model.touch(step)
            _, saved[step] = save(ckpt, model, step)
    check_stored(tmp_path, saved)
    assert not orphans(tmp_path)
    assert not any(f.mixed for f in Root(LocalStorage(tmp_path)).folders())


def three_steps(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Three steps; the others refer to the first, the last has other experts 4 to 6."""
    model, saved = Mixture(), {}
    with begin(path, model) as ckpt:
        for step in (1, 2, 3):
            model.touch(*([4, 5, 6] if step == 3 else []))
            _, saved[step] = save(ckpt, model, step)
    return saved


def test_prune_shows_and_keeps_what_is_referred_to(tmp_path, capsys):
    saved = three_steps(tmp_path)
    root = Root(LocalStorage(tmp_path))
    verdicts = {v.step: v for v in choose(root, KeepLast(1))}
    assert [v.keep for v in verdicts.values()] == [False, False, True]
    assert verdicts[1].why == "files kept for step 3"
    assert verdicts[1].shared == verdicts[1].nbytes > ALL
    assert verdicts[2].shared == 0
    prune(root, KeepLast(1))
    assert states(tmp_path) == {1: "referenced", 3: "committed"}
    check_stored(tmp_path, {3: saved[3]})
    again = {v.step: (v.keep, v.why) for v in prune(root, KeepLast(1))}
    assert again[1] == (True, "files kept for step 3")
    assert main(["ls", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["step"], r["state"]) for r in rows] == [(1, "referenced"), (3, "committed")]
    assert rows[0]["bytes"] > ALL
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path)]) == 0
    assert "step-00000001/rank-00000" in capsys.readouterr().out


def expert_at(path: Path, expert: int) -> tuple[Path, int, int]:
    """The first step's file, where an expert lies in it, and in which chunk."""
    manifest = open_checkpoint(path, 1).manifest
    (box,) = [b for b in manifest.tensors["model.experts"].boxes if b.box.offset[0] == expert]
    start = manifest.files[0].data_start + box.start
    return data_files(path, 1)[0], start, box.start // CHUNK_NBYTES


def test_damage_is_told_of_every_step_that_refers_to_it(tmp_path):
    three_steps(tmp_path)
    file, start, chunk = expert_at(tmp_path, 5)
    flip(file, start)
    for step in (1, 2):
        (problem,) = open_checkpoint(tmp_path, step).verify()
        assert problem.chunk == chunk
        assert "model.experts" in problem.tensors
        assert file.name in str(problem)
    assert "step-00000001/" in str(problem)
    assert open_checkpoint(tmp_path, 3).verify() == []
    with pytest.raises(CorruptError, match="step-00000001/rank-00000"):
        open_checkpoint(tmp_path, 2).read("model.experts")


@pytest.mark.filterwarnings("ignore:step . cannot be restored")
def test_a_missing_file_is_told_of_every_step_that_refers_to_it(tmp_path):
    three_steps(tmp_path)
    data_files(tmp_path, 1)[0].unlink()
    for step in (1, 2, 3):
        assert any(p.what == "is missing" for p in open_checkpoint(tmp_path, step).verify())
    with pytest.raises(CorruptError, match="no committed step"):
        load_once(tmp_path, Mixture().state)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_save_does_not_refer_to_what_is_not_there(tmp_path, damage):
    model = Mixture()
    with begin(tmp_path, model, on_failure="fatal") as ckpt:
        save(ckpt, model, 1)
        (file,) = data_files(tmp_path, 1)
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
        model.touch()
        with pytest.raises(SaveFailedError, match="writes everything anew"):
            ckpt.save(2).wait_committed()
        with pytest.raises(SaveFailedError):
            ckpt.step(2)
        nbytes, saved = save(ckpt, model, 3)
    assert nbytes >= ALL
    check_stored(tmp_path, {3: saved})
    assert not data_files(tmp_path, 2)


def test_the_mirror_gets_what_its_steps_refer_to(tmp_path):
    model, mirror = Mixture(), f"file://{tmp_path}/mirror"
    with begin(tmp_path / "root", model, keep=1, mirror=mirror) as ckpt:
        for step in (1, 2, 3):
            model.touch(step)
            ckpt.save(step).wait_mirrored()
        saved = model.copy()
    assert states(tmp_path / "mirror")[3] == "committed"
    assert states(tmp_path / "mirror")[1] == "referenced"
    check_stored(tmp_path / "mirror", {3: saved})
    assert json.loads((tmp_path / "mirror" / "planaria.json").read_bytes())["format"] == 2
    again = Mixture()
    with begin(tmp_path / "elsewhere", again, mirror=mirror, keep=1) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert report.tier == "mirror"
        assert torch.equal(again.experts, saved["experts"])
        # Nothing of it lies in this root, so nothing is referred to.
        again.touch(*range(8), base=1)
        handle = ckpt.save(4)
        handle.wait_mirrored()
        assert handle.nbytes >= ALL
        again.touch()
        ckpt.save(5).wait_mirrored()
    for place in ("mirror", "elsewhere"):
        check_stored(tmp_path / place, {5: again.copy()})
        assert states(tmp_path / place) == {4: "referenced", 5: "committed"}
        assert not orphans(tmp_path / place)


def check_audit(path: Path) -> None:
    """A write behind the gate is noticed, too, where nothing of the tensor would be written."""
    model = Mixture()
    with begin(path, model, on_failure="fatal") as ckpt:
        save(ckpt, model, 1)
        with held("checkpoint.capture.audit") as hold:
            handle = ckpt.save(2)
            hold.wait_reached()
            model.base.data[3, 3] += 1
        with pytest.raises(SaveFailedError, match=r"model\.base changed while being captured"):
            handle.wait_committed()
        ckpt._failures.take()


def test_a_write_behind_the_gate_fails_the_save(tmp_path):
    check_audit(tmp_path)


def test_only_local_folders_will_do(tmp_path):
    with pytest.raises(ConfigError, match="not a local folder"):
        Checkpointer("memory://dedup", Mixture().state, dedup=True)


def test_without_it_the_format_stays_the_first(tmp_path):
    save_once(tmp_path, Mixture().state)
    assert (tmp_path / "step-00000001" / "manifest.json").read_bytes().endswith(b'"format":1}}\n')
    assert json.loads((tmp_path / "planaria.json").read_bytes())["format"] == 1
    model = Mixture()
    with begin(tmp_path, model) as ckpt:
        ckpt.restore()
        save(ckpt, model, 2)
    assert open_checkpoint(tmp_path, 1).manifest.format == 1
    assert open_checkpoint(tmp_path, 2).manifest.format == 2
    assert json.loads((tmp_path / "planaria.json").read_bytes())["format"] == 2


@pytest.mark.parametrize("bad", [-1, "1", 1.5, None, True, [1]])
def test_a_reference_out_of_the_root_is_refused(tmp_path, bad):
    three_steps(tmp_path)
    body = json.loads((tmp_path / "step-00000003" / "manifest.json").read_bytes())["manifest"]
    file = next(f for f in body["files"] if len(f) > 6)
    file[6] = bad
    with pytest.raises(CorruptError):
        Manifest.from_bytes(signed(body), "here")


@pytest.mark.parametrize(
    "digests", [{"model.base": []}, {"no.such": []}, {"model.head": ["zz"]}, {"model.head": [7]}, 3]
)
def test_digests_that_fit_nothing_are_refused(tmp_path, digests):
    three_steps(tmp_path)
    body = json.loads((tmp_path / "step-00000003" / "manifest.json").read_bytes())["manifest"]
    with pytest.raises(CorruptError):
        Manifest.from_bytes(signed({**body, "digests": digests}), "here")
    with pytest.raises(CorruptError):
        Manifest.from_bytes(signed({**body, "format": 1}), "here")


@pytest.mark.parametrize(
    ("shape", "most", "count"),
    [
        ((), 64, 1),
        ((0, 5), 64, 1),
        ((16,), 64, 1),
        ((17,), 64, 2),
        ((3, 100), 64, 21),  # rows longer than a piece
        ((8, 4, 4), 64, 8),  # experts, a piece each
        ((8, 4, 4), 256, 8),
        ((512, 2, 2), 1024, 8),  # small rows: as many as fit
        ((1, 40, 2), 64, 5),
    ],
)
def test_pieces_are_the_box(shape, most, count):
    found = pieces(Box.full(shape), 4, most)
    assert len(found) == count
    marks = torch.zeros(shape, dtype=torch.int64)
    for piece in found:
        part = marks[piece.slices()]
        part += 1
        assert part.is_contiguous()
        assert piece.volume * 4 <= most
    assert bool((marks == 1).all())


# The tests notice when it does not work


def test_sabotage_digests_do_not_tell_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "digest_of", lambda data: bytes(32))
    must_notice(check_unchanged_is_not_written, tmp_path)


def test_sabotage_a_step_is_being_written_until_old_ones_are_removed(tmp_path, monkeypatch):
    hold = StepsInUse.hold
    monkeypatch.setattr(StepsInUse, "hold", lambda s, n: n not in s._held and hold(s, n))
    must_notice(check_next_refers, tmp_path)


def test_sabotage_removal_looks_at_no_references(tmp_path, monkeypatch):
    monkeypatch.setattr(Root, "held", lambda self, without=None: set())
    must_notice(check_keeping_one, tmp_path)


def test_sabotage_what_is_referred_to_is_not_audited(tmp_path, monkeypatch):
    monkeypatch.setattr("planaria.checkpoint.capture.audit.Audit.check", lambda self: None)
    must_notice(check_audit, tmp_path)
