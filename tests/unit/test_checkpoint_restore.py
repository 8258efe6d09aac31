"""Restoring: what does not fit is listed, damage falls back, and an error changes nothing."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    JSON_JUNK,
    contents,
    data_files,
    flip,
    load_once,
    must_notice,
    places,
    randomise,
    save_once,
    signed,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from restore_cases import Counter, damage, everything, make, refused, save_steps
from torch import nn

from planaria.checkpoint import Checkpointer, Fuse, Pad, Rename, open_checkpoint
from planaria.checkpoint.capture import audit
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.manifest import FORMAT
from planaria.checkpoint.restore import name_filter
from planaria.errors import (
    ConfigError,
    CorruptError,
    FormatError,
    MismatchError,
    NotCommittedError,
    PlanariaError,
    StateError,
)

# Falling back is told by a warning, too, which one test looks at.
pytestmark = pytest.mark.filterwarnings("ignore:step .* cannot be restored")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save_once(path, make(1), 5)
    return path


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """A copy of the saved one, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "root"))


def test_an_empty_root_restores_nothing(tmp_path):
    state = make(1)
    before = everything(state)
    assert load_once(tmp_path, state) is None
    assert everything(state) == before


def test_the_report(tmp_path):
    state = make(1)
    with torch.no_grad():
        state["model"][0].weight[0, 0] = float("nan")
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        metrics = {"loss": float("nan"), "lr": torch.tensor(0.5), "n": np.int64(3), "name": "x"}
        handle = ckpt.save(7, metrics)
        handle.wait_committed()
        assert handle.nan_names == ["model.0.weight"]
    report = load_once(tmp_path, make(2))
    assert (report.step, report.tier, report.world_size) == (7, "durable", 1)
    assert (report.missing, report.skipped, report.fell_back_from) == ([], {}, [])
    assert report.nan_names == ["model.0.weight"]
    assert contents(report.metrics) == contents(
        {"loss": float("nan"), "lr": 0.5, "n": 3, "name": "x"}
    )
    assert report.nbytes == open_checkpoint(tmp_path).manifest.files[0].data_nbytes


def test_missing_unexpected_shapes_and_dtypes_are_all_listed_by_name(saved):
    state = make(2)
    state["model"] = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2).double(), nn.Linear(1, 1, bias=False)
    )
    del state["data"]
    state["other"] = Counter(1)
    state["extra"]["a"] = np.zeros(3, dtype=np.int64)
    text = refused(saved, state, MismatchError, "step 5 does not match")
    for part in (
        "in the state but not in the checkpoint: ",
        "model.3.weight",
        "other",
        "in the checkpoint but not in the state: ",
        "data",
        "model.0.weight: shape [4, 3] in the checkpoint, [5, 3] here",
        "model.0.bias: shape [4] in the checkpoint, [5] here",
        "model.2.weight: dtype float32 in the checkpoint, float64 here",
        "extra.a: shape [2] in the checkpoint, [3] here",
        "strict=False",
    ):
        assert part in text


def test_not_strict_loads_what_matches_and_reports_the_rest(saved):
    state, source = make(2), make(1)
    state["model"] = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2).double(), nn.Linear(1, 1, bias=False)
    )
    del state["data"], state["optim"], state["sched"]
    state["other"] = Counter(7)
    before = {n: contents(t) for n, t in state["model"].state_dict().items()}
    report = load_once(saved, state, strict=False)
    assert sorted(report.missing) == ["model.3.weight", "other"]
    assert report.skipped["model.0.weight"].startswith("shape [4, 3]")
    assert report.skipped["model.2.bias"].startswith("dtype float32")
    assert report.skipped["data"] == "not in the state"
    assert state["other"].value == 7
    assert contents(state["extra"]) == contents(source["extra"])
    assert contents(state["model"][1]) == contents(source["model"][1])
    for name, value in before.items():
        if not name.startswith("1."):
            assert contents(state["model"].state_dict()[name]) == value


@pytest.mark.parametrize(
    ("only", "restored"),
    [
        ("model", {"model"}),
        (["model", "extra"], {"model", "extra"}),
        ("data", {"data"}),
        (["opt*", "sched"], {"optim", "sched"}),
        ("*", {"model", "optim", "sched", "data", "extra"}),
        (["rng"], set()),
    ],
)
def test_only_some_names(saved, only, restored):
    state, source = make(2), make(1)
    before = everything(state)
    torch.manual_seed(99)
    rng = contents(torch.get_rng_state())
    load_once(saved, state, only=only)
    found = everything(state)
    for key in state:
        expected = contents(source[key]) if key in restored else before[key]
        assert found[key] == expected, key
    assert (contents(torch.get_rng_state()) == rng) == (only not in (["rng"], "*"))


def test_only_one_tensor_by_its_whole_name(saved):
    state, source = make(2), make(1)
    bias = contents(state["model"][0].bias)
    load_once(saved, state, only=["model.0.weight"])
    assert contents(state["model"][0].weight) == contents(source["model"][0].weight)
    assert contents(state["model"][0].bias) == bias


def test_only_a_name_that_nobody_has(saved):
    refused(saved, make(2), MismatchError, "modle", only="modle")


def test_name_filter():
    assert name_filter(None)("anything")
    wanted = name_filter(["model", "opt*.bias", "x.y"])
    assert all(map(wanted, ["model", "model.a.b", "optim.3.bias", "x.y", "x.y.z"]))
    assert not any(map(wanted, ["models", "modelx.a", "optim.3.weight", "x", "x.yz"]))


def test_a_step_that_is_not_there(saved):
    refused(saved, make(2), NotCommittedError, "no committed step 6; committed: 5", step=6)


def test_a_transform_that_fits_nothing(saved):
    for transform in (Rename("nothing", "more"), Fuse(["a", "b"], "c"), Pad("x", [1])):
        refused(saved, make(2), ConfigError, "matches no tensor", transforms=[transform])


def every_chunk(path: Path) -> list[int]:
    (file,) = open_checkpoint(path).manifest.files
    return list(range(len(file.chunk_checksums)))


def test_damage_anywhere_in_the_data_changes_nothing(tmp_path):
    """Several chunks: the last one is bad, the first ones are good, and none is put in place."""
    big = {"model": randomise(nn.Linear(1100, 2800, bias=False), 1), "data": Counter(1)}
    save_once(tmp_path, big, 5)
    assert len(every_chunk(tmp_path)) == 3
    (file,) = data_files(tmp_path, 5)
    target = {"model": randomise(nn.Linear(1100, 2800, bias=False), 2), "data": Counter(2)}
    before = {k: contents(v) for k, v in target.items()}
    info = open_checkpoint(tmp_path).manifest.files[0]
    for chunk in every_chunk(tmp_path):
        start, nbytes = info.chunk_range(chunk)
        for inside in (0, nbytes - 1):
            at = info.data_start + start + inside
            flip(file, at)
            with pytest.raises(CorruptError, match=rf"chunk {chunk} is damaged.*model\.weight"):
                load_once(tmp_path, target)
            assert {k: contents(v) for k, v in target.items()} == before
            flip(file, at)
    load_once(tmp_path, target)
    assert {k: contents(v) for k, v in target.items()} == {k: contents(v) for k, v in big.items()}


def test_a_flip_at_any_byte_of_a_small_file_changes_nothing(root):
    check_flips_are_refused(root)


def test_sabotage_no_checksum(tmp_path, monkeypatch):
    monkeypatch.setitem(checksum._ALGORITHMS, "crc32c", lambda _: 0)
    monkeypatch.setattr(audit, "extend", lambda *_: 0)
    monkeypatch.setattr(CheckedCopy, "available", staticmethod(lambda: False))
    save_once(tmp_path, make(1), 5)
    must_notice(check_flips_are_refused, tmp_path)


def check_flips_are_refused(root: Path) -> None:
    (file,) = data_files(root, 5)
    start = open_checkpoint(root).manifest.files[0].data_start
    state = make(2)
    for at in range(start, file.stat().st_size, 17):
        flip(file, at, 0x01)
        refused(root, state, CorruptError, "chunk 0 is damaged")
        flip(file, at, 0x01)


def test_a_cut_or_missing_file_changes_nothing(root):
    (file,) = data_files(root, 5)
    whole, state = file.read_bytes(), make(2)
    for keep in (len(whole) - 1, len(whole) // 2, 4096, 10, 0):
        file.write_bytes(whole[:keep])
        refused(root, state, CorruptError, "chunk 0 is cut off")
    file.unlink()
    refused(root, state, CorruptError, "is missing")


def test_an_explicit_step_does_not_fall_back(root):
    state = make(1)
    with Checkpointer(root, state, audit=True) as ckpt:
        ckpt.restore()
        ckpt.save(6).wait_committed()
    flip(data_files(root, 6)[0], -1)
    refused(root, make(2), CorruptError, "step-00000006", step=6)


@pytest.mark.parametrize("how", ["data", "missing", "manifest", "objects", "empty"])
def test_damage_falls_back_to_the_newest_good_step_and_says_so(how, tmp_path):
    saved = save_steps(tmp_path, [10, 20, 30, 40])
    damage(tmp_path, 40, how)
    damage(tmp_path, 30, "data")
    state = make(2)
    with pytest.warns(UserWarning, match="step 40 cannot be restored"):
        report = load_once(tmp_path, state)
    assert report.step == 20
    assert [step for step, _ in report.fell_back_from] == [40, 30]
    assert "step-00000030" in report.fell_back_from[1][1]
    assert {k: contents(v) for k, v in state.items()} == saved[20]

    damage(tmp_path, 20, "data")
    damage(tmp_path, 10, "manifest")
    text = refused(tmp_path, make(2), CorruptError, "no committed step .* can be read")
    assert all(f"step {step}" in text for step in (10, 20, 30, 40))


def test_a_newer_format_is_no_reason_to_fall_back(tmp_path):
    save_steps(tmp_path, [10, 20])
    manifest = tmp_path / "step-00000020" / "manifest.json"
    body = json.loads(manifest.read_bytes())["manifest"]
    body["format"] = FORMAT + 1
    manifest.write_bytes(signed(body))
    refused(tmp_path, make(2), FormatError, f"format {FORMAT + 1} is newer")


def test_a_step_without_a_manifest_does_not_exist(tmp_path):
    save_steps(tmp_path, [10, 20])
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    assert load_once(tmp_path, make(2)).step == 10


def test_a_manifest_of_another_step_is_refused(tmp_path):
    save_steps(tmp_path, [10])
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000020")
    refused(tmp_path, make(2), CorruptError, "is the manifest of step 10")


@settings(
    max_examples=60,
    # One folder for all examples: each of them writes the manifest anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_whatever_a_manifest_says_an_error_is_clear_and_changes_nothing(root, saved, data):
    """One field of a manifest with a valid digest is something else."""
    manifest = "step-00000005/manifest.json"
    body = json.loads((saved / manifest).read_bytes())["manifest"]
    for key in ("files", "objects", "tensors", "aliases", "objects"):
        if data.draw(st.booleans()):
            ways = [(key, *p) for p in places(body[key])]
            break
    else:
        ways = places(body)
    *way, last = data.draw(st.sampled_from(ways or [("step",)]))
    parent = copy.deepcopy(body)
    whole = parent
    for key in way:
        parent = parent[key]
    parent[last] = data.draw(JSON_JUNK)
    (root / manifest).write_bytes(signed(whole))
    state = make(2)
    before = everything(state)
    try:
        load_once(root, state, strict=data.draw(st.booleans()))
    except StateError as error:
        # What only the object itself can judge is told at the very end.
        if "half restored" not in str(error) or way[:2] not in (["objects"], ["objects", "sched"]):
            assert everything(state) == before
    except PlanariaError:
        assert everything(state) == before


def test_an_object_that_refuses_its_state_is_told_as_such(saved):
    class Stubborn(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ValueError("I will not")

    state = make(2)
    state["data"] = Stubborn(2)
    with pytest.raises(StateError, match=r"half restored.*do not train") as caught:
        load_once(saved, state)
    assert "I will not" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
