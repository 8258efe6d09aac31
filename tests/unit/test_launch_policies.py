"""The policies that a configuration describes, and a run that follows them."""

import os
from typing import Any

import pytest

from planaria.checkpoint import KeepBest, KeepEvery, KeepLast
from planaria.checkpoint.policies import AnyOf, Every, EverySeconds
from planaria.launch import config, policies
from planaria.launch.config import CheckpointConf


@pytest.mark.parametrize(
    ("overrides", "saves", "keeps"),
    [
        ([], "Every(steps=20)", "KeepLast(count=3)"),
        (["checkpoint=often"], "Every(steps=5)", "KeepLast(count=3)"),
        (
            ["checkpoint=adaptive"],
            "EverySeconds(seconds=1800.0) | Adaptive(0.03)",
            "KeepLast(count=3)",
        ),
        (["checkpoint.every=null", "checkpoint.keep=null"], "None", "None"),
        (
            ["checkpoint.on_signal=usr2", "checkpoint.keep_every=100"],
            "Every(steps=20) | OnSignal('SIGUSR2')",
            "KeepLast(count=3) | KeepEvery(steps=100)",
        ),
        (
            ["checkpoint.keep_best=loss", "checkpoint.keep_best_count=2"],
            "Every(steps=20)",
            "KeepLast(count=3) | KeepBest(metric='loss', count=2, mode='min')",
        ),
    ],
)
def test_what_a_configuration_says(overrides, saves, keeps) -> None:
    conf = config.compose(overrides).checkpoint
    assert repr(policies.save_policy(conf)) == saves
    assert repr(policies.keep_policy(conf)) == keeps


def test_a_frozen_configuration_of_before_has_the_defaults(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("checkpoint: {every: 7, keep: 2, on_failure: retry, audit: false}\n")
    conf: Any = config.load(path).checkpoint
    assert policies.save_policy(conf) == Every(7)
    assert policies.keep_policy(conf) == KeepLast(2)


def test_unions() -> None:
    conf: Any = CheckpointConf(every=2, every_seconds=3.0, keep=1, keep_every=4, keep_best="loss")
    assert policies.save_policy(conf) == AnyOf(Every(2), EverySeconds(3.0))
    assert policies.keep_policy(conf) == KeepLast(1) | KeepEvery(4) | KeepBest("loss")


def test_nothing_is_imported_to_look_at_a_configuration() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from planaria.launch import config; config.compose(['checkpoint=adaptive']); "
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=os.environ
    )
    assert ran.stdout.strip() == "False", ran.stderr
