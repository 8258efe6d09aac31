"""A run that saves when `planaria run` gets a signal, and trains on."""

import signal
from pathlib import Path

from launches import LOADED, TINY, finish, started, wait_until

from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.launch import metrics


def test_the_launcher_passes_the_signal_on(tmp_path: Path) -> None:
    command = [*LOADED, "run", *TINY, "--run", "run", "steps=100000", "checkpoint.every=null",
               "checkpoint.on_signal=USR1", "-n", "1"]  # fmt: skip
    root = Root(LocalStorage(tmp_path / "run" / "ckpt"))

    def logged() -> int:
        return len(metrics.read(tmp_path / "run" / "metrics.jsonl"))

    with started(command, tmp_path) as process:
        wait_until(lambda: logged() > 3, "steps")
        for count in (1, 2):
            process.send_signal(signal.SIGUSR1)
            wait_until(lambda count=count: len(root.steps()) == count, "a checkpoint")
        before = logged()
        wait_until(lambda: logged() > before + 2, "steps after it")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.code == 75, ended.err + ended.out
    assert len(root.steps()) == 3, "the last one at the stop"
