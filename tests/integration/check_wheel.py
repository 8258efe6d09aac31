"""Checks the built wheel: `contents WHEEL` looks into it, `smoke SITE` uses it where installed."""

import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("checkpoint", "elastic", "parallel", "rl_sync", "launch")


def contents(wheel: Path) -> None:
    """Every module and data file of the tree is in the wheel, at its place, and nothing else is."""
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    sources = {ROOT / "src": "", **{ROOT / each: f"planaria/{each}" for each in FOLDERS}}
    expected = {PurePosixPath("planaria/py.typed")}
    for source, inside in sources.items():
        for pattern in ("*.py", "*.yaml"):
            for file in source.rglob(pattern):
                expected.add(PurePosixPath(inside) / file.relative_to(source).as_posix())
    found = {name for name in names if not name.parts[0].endswith(".dist-info")}
    missing, stray = expected - found, {name for name in found - expected if name.suffix != ".md"}
    configs = [name for name in found if name.suffix == ".yaml"]
    if stray or missing or not configs:
        sys.exit(
            f"{wheel.name}: not expected: {sorted(map(str, stray))};"
            f" missing: {sorted(map(str, missing))}; configurations: {len(configs)}"
        )
    print(f"{wheel.name}: {len(expected)} files expected, all there; {len(configs)} configurations")


def smoke(site: Path) -> None:
    """The installed wheel imports, refuses foreign names, and brings state back as it was."""
    import planaria

    found = Path(planaria.__file__ or "").resolve()
    assert found.is_relative_to(site.resolve()), f"planaria comes from {found}, not from {site}"
    for folder in FOLDERS:
        module = importlib.import_module(f"planaria.{folder}")
        assert Path(module.__file__ or "").resolve().is_relative_to(site.resolve()), module
        try:
            importlib.import_module(folder)
        except ImportError:
            assert folder not in sys.modules
        else:
            raise AssertionError(f"'import {folder}' works")
    assert "torch" not in sys.modules, "importing the packages imported torch"

    shown = _planaria(site, "--help")
    assert "run" in shown, shown
    assert "verify" in shown, shown
    with tempfile.TemporaryDirectory() as folder:
        _round_trip(Path(folder) / "ckpt")
        run = Path(folder) / "run"
        _planaria(site, "run", "-n", "1", "--run", str(run), "steps=4", "checkpoint.every=2")
        _planaria(site, "verify", str(run))
    print(f"the wheel in {site} works: imports, command line, save and restore, a training run")


def _planaria(site: Path, *args: str) -> str:
    done = subprocess.run(
        [site / "bin" / "planaria", *args], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"planaria {args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _round_trip(root: Path) -> None:
    import torch

    from planaria.checkpoint import Checkpointer, open_checkpoint

    def training(seed: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(8, 4)
        optim = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        optim.step()
        return model, optim

    model, optim = training(seed=0)
    with Checkpointer(str(root), {"model": model, "optim": optim}) as ckpt:
        ckpt.save(3).wait_committed()
    other, other_optim = training(seed=1)
    assert not torch.equal(other.weight, model.weight)
    with Checkpointer(str(root), {"model": other, "optim": other_optim}) as ckpt:
        report = ckpt.restore()
    assert report is not None
    assert report.step == 3
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        list(other_optim.state.values()), list(optim.state.values()), rtol=0, atol=0
    )
    assert torch.equal(open_checkpoint(str(root)).read("model.weight"), model.weight)


if __name__ == "__main__":
    {"contents": contents, "smoke": smoke}[sys.argv[1]](Path(sys.argv[2]))
