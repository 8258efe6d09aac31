"""The verbs that look: ls, inspect, verify; how all verbs report errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planaria.checkpoint import Checkpointer
from planaria.errors import ConfigError, CorruptError, FormatError, MismatchError, StorageError
from planaria.launch import exit_codes
from planaria.launch.cli import main
from planaria.launch.config import RunConf
from planaria.launch.run_folder import DONE, RUNNING, Attempt, RunFolder, Status


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a run with three checkpoints, the last with a NaN."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    folder = RunFolder(path)
    folder.lock()
    folder.freeze(RunConf(steps=3), {"python": "3"})
    folder.write_status(Status(DONE, 3, 3, [Attempt(0, 1, 0.0, 1.0, DONE)]))
    folder.unlock()
    model = torch.nn.Linear(3, 2)
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Checkpointer(folder.ckpt, {"model": model, "optim": optim}, every=1) as ckpt:
        for step in range(3):
            optim.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optim.step()
            if step == 2:
                with torch.no_grad():
                    model.bias[0] = float("nan")
            ckpt.step(step + 1, {"loss": 0.5})
            ckpt.before_update()
    return path


def copy_of(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "copy"))


def run(capsys, *args: str):
    code = main(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *args: str):
    code, out, _ = run(capsys, *args, "--json")
    return code, json.loads(out)


def test_ls_lists_the_steps_of_a_run_and_of_a_root(made, capsys):
    for path in (made, made / "ckpt"):
        code, rows = run_json(capsys, "ls", str(path))
        assert code == 0
        assert [(r["step"], r["state"], r["ranks"]) for r in rows] == [
            (1, "committed", 1),
            (2, "committed", 1),
            (3, "committed", 1),
        ]
        assert rows[0]["metrics"] == {"loss": 0.5}
        assert rows[0]["bytes"] > 0
    _, out, _ = run(capsys, "ls", str(made))
    assert "committed" in out
    assert "loss=0.5" in out


@pytest.mark.parametrize("verb", ["ls", "verify", "inspect"])
def test_a_url_where_nothing_is(verb, capsys):
    code, out, err = run(capsys, verb, "memory://nothing")
    assert (code, out) == (exit_codes.FAILED, "")
    assert "memory://nothing" in err


def test_ls_of_a_run_that_has_saved_nothing_so_far(made, tmp_path, capsys):
    import shutil

    copy = copy_of(made, tmp_path)
    shutil.rmtree(copy / "ckpt")
    assert run(capsys, "ls", str(copy)) == (0, "no checkpoints\n", "")


@pytest.mark.parametrize("text", ["", "{", '{"step": []}'])
def test_ls_lists_a_run_whose_status_is_damaged(made, tmp_path, capsys, text):
    copy = copy_of(made, tmp_path)
    (copy / "status.json").write_text(text)
    code, rows = run_json(capsys, "ls", str(tmp_path))
    assert code == 0
    assert [(r["run"], r["state"]) for r in rows] == [("copy", "status unreadable")]


def test_ls_lists_the_runs_of_a_folder(made, capsys):
    code, rows = run_json(capsys, "ls", str(made.parent))
    assert code == 0
    assert [(r["run"], r["state"], r["step"], r["attempts"]) for r in rows] == [
        ("demo", DONE, 3, 1)
    ]
    _, out, _ = run(capsys, "ls", str(made.parent))
    assert "demo" in out


def test_ls_tells_of_what_is_not_whole(made, tmp_path, capsys):
    path = copy_of(made, tmp_path)
    (path / "ckpt" / "step-00000001" / "manifest.json").unlink()
    manifest = path / "ckpt" / "step-00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    code, rows = run_json(capsys, "ls", str(path))
    assert code == 0
    assert [r["state"] for r in rows] == ["uncommitted", "damaged", "committed"]
    assert "manifest" in rows[1]["error"]


def test_ls_shows_a_run_whose_launcher_died(made, tmp_path, capsys):
    folder = RunFolder(copy_of(made, tmp_path))
    folder.write_status(Status(RUNNING, 1, 3, []))
    _, rows = run_json(capsys, "ls", str(tmp_path))
    assert rows[0]["state"] == "lost its launcher"
    folder.lock()
    _, rows = run_json(capsys, "ls", str(tmp_path))
    folder.unlock()
    assert rows[0]["state"] == RUNNING


def test_inspect_tells_all_of_a_step(made, capsys):
    code, facts = run_json(capsys, "inspect", str(made))
    assert code == 0
    assert (facts["step"], facts["world_size"], facts["metrics"]) == (3, 1, {"loss": 0.5})
    assert facts["parts"]["model"]["tensors"] == 2
    assert facts["parts"]["model"]["bytes"] == 8 * 4
    assert facts["parts"]["optim"]["dtypes"] == {"float32": 8 * 4}
    weight = facts["tensors"]["model.weight"]
    assert (weight["dtype"], weight["shape"]) == ("float32", [2, 3])
    assert weight["boxes"][0]["extent"] == [2, 3]
    assert "model.bias" in facts["nan"]
    assert facts["configuration"]["steps"] == 3
    assert "rng" in facts["objects"]


def test_inspect_for_people(made, capsys):
    _, out, _ = run(capsys, "inspect", str(made), "--step", "2", "--tensors")
    assert "step   " in out or "step  " in out
    for said in ("model.weight", "2x3", "float32", "NaN", "none", "optim", "configuration"):
        assert said in out
    _, out, _ = run(capsys, "inspect", str(made / "ckpt" / "step-00000003"))
    assert "model.bias" in out


def test_verify_reads_all_steps(made, capsys):
    code, report = run_json(capsys, "verify", str(made))
    assert code == 0
    assert [(s["step"], s["problems"]) for s in report["steps"]] == [(1, []), (2, []), (3, [])]
    _, out, _ = run(capsys, "verify", str(made), "--step", "2")
    assert out.startswith("step 2: good")
    assert out.count("step") == 1


def test_verify_names_file_tensor_and_chunk(made, tmp_path, capsys):
    path = copy_of(made, tmp_path)
    (data,) = (path / "ckpt" / "step-00000002").glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    code, report = run_json(capsys, "verify", str(path))
    assert code == exit_codes.CORRUPT
    (problem,) = report["steps"][1]["problems"]
    assert problem["file"] == data.name
    assert problem["chunk"] == 0
    assert problem["tensors"]
    assert [s["problems"] for s in report["steps"]][::2] == [[], []]
    code, out, _ = run(capsys, "verify", str(path), "--step", "2")
    assert code == exit_codes.CORRUPT
    assert data.name in out
    assert problem["tensors"][0] in out


@pytest.mark.parametrize("where", ["header", "cut", "longer", "gone", "manifest"])
def test_verify_notices_any_damage(made, tmp_path, capsys, where):
    path = copy_of(made, tmp_path)
    step = path / "ckpt" / "step-00000003"
    (data,) = step.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    if where == "header":
        content[20] ^= 1
        data.write_bytes(content)
    elif where == "cut":
        data.write_bytes(content[:-1])
    elif where == "longer":
        data.write_bytes(bytes(content) + b"x")
    elif where == "gone":
        data.unlink()
    else:
        manifest = bytearray((step / "manifest.json").read_bytes())
        manifest[100] ^= 1
        (step / "manifest.json").write_bytes(manifest)
    code, report = run_json(capsys, "verify", str(path), "--step", "3")
    assert code == exit_codes.CORRUPT
    assert report["steps"][0]["problems"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["ls", "/nowhere"], 2, "no folder /nowhere"),
        (["inspect", "/nowhere"], 2, "no folder"),
        (["verify", "/nowhere"], 2, "no folder"),
        (["verify"], 2, "--help"),
        (["fly"], 2, "fly"),
        (["ls", "--colour"], 2, "--colour"),
        (["run", "-n", "many"], 2, "-n"),
        (["run", "stepz=3"], 2, "steps"),
        (["run", "-n", "0"], 2, "launcher.nproc"),
        (["run", "--"], 2, "script"),
        (["run", "--", "/nowhere/train.py"], 2, "/nowhere/train.py"),
        (["run", "--nnodes", "2"], 2, "--rdzv"),
    ],
)
def test_errors_are_one_line_and_the_code_tells(capsys, tmp_path, monkeypatch, args, code, said):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *args)
    assert got == code
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_no_run(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    for verb in ("ls", "inspect", "verify"):
        code, _, err = run(capsys, verb, str(tmp_path))
        assert code == 2
        assert "neither" in err


def test_a_step_that_is_not_there(made, capsys):
    for verb in ("inspect", "verify"):
        code, _, err = run(capsys, verb, str(made), "--step", "9")
        assert code == 1
        assert "9" in err


def test_debug_shows_the_traceback(capsys):
    _, _, err = run(capsys, "ls", "/nowhere", "--debug")
    assert "Traceback" in err
    assert "planaria: there is no folder" in err


def test_help_names_every_verb_and_the_exit_codes(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in (
        *("run", "ls", "inspect", "verify"),
        *("diff", "prune", "trace", "goodput", "doctor"),
    ):
        assert verb in out
    _, out, _ = run(capsys, "run", "--help")
    assert "75 preempted" in " ".join(out.split())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(), 2),
        (MismatchError(), 2),
        (CorruptError(), 3),
        (FormatError(), 3),
        (StorageError(), 1),
        (ValueError(), 1),
    ],
)
def test_exit_codes(error, code):
    assert exit_codes.exit_code_of(error) == code


def test_the_command_line_starts_without_torch_or_hydra():
    code = (
        "import sys; from planaria.launch.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'hydra', 'numba') if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.stderr.strip() == "[]"


def test_it_is_a_module_and_a_command(tmp_path):
    script = Path(sys.executable).with_name("planaria")
    for command in ([sys.executable, "-m", "planaria.launch.cli"], [str(script)]):
        ran = subprocess.run([*command, "ls", "/nowhere"], capture_output=True, timeout=240)
        assert ran.returncode == 2
        assert ran.stderr == b"planaria: there is no folder /nowhere\n"


APP = """
import hydra
@hydra.main(version_base=None)
def main(cfg):
    print(cfg.optim.lr, cfg.checkpoint.every)
main()
"""


def test_other_hydra_applications_see_the_groups(tmp_path):
    app = tmp_path / "app.py"
    app.write_text(APP)
    command = [sys.executable, str(app), "+optim=adamw", "+checkpoint=often", "optim.lr=7"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ran.stdout.strip() == "7 5", ran.stderr


def test_the_plugin_folder_stays_a_namespace():
    import hydra_plugins

    assert hydra_plugins.__file__ is None


# Beside a job that goes on


def removed_as_it_is_read(monkeypatch: pytest.MonkeyPatch, folder: Path, verify: bool) -> None:
    """Step 1 goes as soon as its manifest was read, or before."""
    import shutil

    from planaria.checkpoint.storage.root import Root

    manifest = Root.manifest

    def reads(self: Root, step: int):
        found = manifest(self, step) if verify else None
        if step == 1:
            shutil.rmtree(folder / "ckpt" / "step-00000001", ignore_errors=True)
        return found or manifest(self, step)

    monkeypatch.setattr(Root, "manifest", reads)


def test_verify_passes_over_what_goes_meanwhile(made, tmp_path, capsys, monkeypatch):
    folder = copy_of(made, tmp_path)
    with monkeypatch.context() as patch:
        removed_as_it_is_read(patch, folder, verify=True)
        code, found = run_json(capsys, "verify", str(folder))
    assert code == exit_codes.DONE
    assert [step["step"] for step in found["steps"]] == [2, 3]
    folder = copy_of(made, tmp_path / "again")
    removed_as_it_is_read(monkeypatch, folder, verify=True)
    code, out, err = run(capsys, "verify", str(folder), "--step", "1", "--json")
    assert (code, out) == (exit_codes.FAILED, "")
    assert "no committed step 1" in err


@pytest.mark.parametrize("verb", [["ls"], ["prune", "--keep-last", "1"]])
def test_listings_pass_over_what_goes_meanwhile(made, tmp_path, capsys, monkeypatch, verb):
    folder = copy_of(made, tmp_path)
    removed_as_it_is_read(monkeypatch, folder, verify=False)
    code, found = run_json(capsys, verb[0], str(folder), *verb[1:])
    assert code == 0
    rows = found if verb == ["ls"] else found["steps"]
    assert [(row["step"], row["state"]) for row in rows] == [(2, "committed"), (3, "committed")]


def test_diff_says_that_a_step_went_meanwhile(made, tmp_path, capsys, monkeypatch):
    folder = copy_of(made, tmp_path)
    removed_as_it_is_read(monkeypatch, folder, verify=True)
    code, out, err = run(capsys, "diff", str(folder), "--step", "1", "--step", "2", "--json")
    assert (code, out) == (exit_codes.FAILED, "")
    assert "step 1 of" in err
    assert "was removed, or saved anew, while it was read" in err


@pytest.mark.parametrize("verb", ["ls", "inspect", "verify", "prune", "trace", "doctor"])
def test_an_empty_path_is_not_the_current_folder(verb, capsys, monkeypatch, made):
    monkeypatch.chdir(made)
    more = ["--keep-last", "1", "--yes"] if verb == "prune" else []
    code, out, err = run(capsys, verb, "", *more)
    assert (code, out) == (exit_codes.CONFIG, "")
    assert "the path is empty" in err


@pytest.mark.parametrize("verb", [["ls"], ["inspect"], ["prune", "--keep-last", "1"]])
def test_json_is_json_whatever_the_metrics_are(verb, tmp_path, capsys):
    state = {"model": torch.nn.Linear(1, 1)}
    odd = {"loss": float("nan"), "best": float("inf"), "of": {"a": [1, None, "x"]}, "n": 1 << 70}
    with Checkpointer(tmp_path / "root", state) as ckpt:
        ckpt.save(1, odd).wait_committed()
    code, out, _ = run(capsys, verb[0], str(tmp_path / "root"), *verb[1:], "--json")
    assert code == 0
    json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert run(capsys, verb[0], str(tmp_path / "root"), *verb[1:])[0] == 0
