"""The default job's loop as an elastic session; every rank runs it.

Read it as an example beside `planaria.launch.demo.train`: the same model, data and schedule, and a
run that loses ranks, or gains them, and goes on.
"""

import os
import signal
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from planaria import telemetry
from planaria.checkpoint import Checkpointer
from planaria.core.points import point
from planaria.elastic import Session
from planaria.elastic.preemption import Notices, OnFile, OnPoll, OnSignal, Source, slurm, url_notice
from planaria.launch import policies
from planaria.launch.config import RunConf
from planaria.launch.demo.build import STEP, Place, build, device_of, mirror_of, record_of
from planaria.launch.exit_codes import DONE, PREEMPTED
from planaria.launch.metrics import MetricsWriter, StepRecord, read
from planaria.launch.run_folder import RunFolder

#: So many records does each rank keep, to write them when it becomes the one that writes.
_KEPT = 8


def train(conf: RunConf, folder: RunFolder) -> int:
    """Trains the run in a folder from where it stands, on this rank.

    Returns:
        Exit code of the rank: done, or preempted when the run was asked to stop before its end.
    """
    elastic = conf.elastic
    model, optim, sched, data = build(conf, Place(0, 1, device_of(conf.device, 0)))
    checkpointer = Checkpointer(
        folder.ckpt,
        {"model": model},
        every=policies.save_policy(conf.checkpoint),
        keep=policies.keep_policy(conf.checkpoint),
        on_failure=conf.checkpoint.on_failure,  # pyright: ignore[reportArgumentType]
        mirror=mirror_of(conf),
        dedup=conf.checkpoint.dedup,
        audit=conf.checkpoint.audit,
        timeout_s=conf.launcher.collective_timeout_s,
    )
    with _notices(conf) as notices:
        session = Session(
            model,
            optim,
            data,
            steps=conf.steps,
            scheduler=sched,
            clip_grad_norm=conf.optim.clip_grad_norm,
            checkpointer=checkpointer,
            consistency=elastic.consistency,  # pyright: ignore[reportArgumentType]
            zero_stage=elastic.zero_stage,
            redundancy=elastic.redundancy,
            group=elastic.group,
            seed=conf.seed,
            recovery_s=elastic.recovery_s,
            record=folder.path / "commits.jsonl",
            notices=notices,
        )
        return _loop(session, model, sched, conf, folder)


def _loop(
    session: Session, model: nn.Module, sched: LRScheduler, conf: RunConf, folder: RunFolder
) -> int:
    with session, _Metrics(folder.metrics) as log:
        began = time.perf_counter()
        for step in session:
            point(STEP, step=step.number + 1)
            lr = float(sched.get_last_lr()[0])
            with step, telemetry.span("train.step", step=step.number):
                for tokens, targets in step.micro_batches():
                    step.backward(model(tokens, targets).loss)
            if step.committed:
                now = time.perf_counter()
                record = record_of(conf, step.number + 1, step.metrics["loss"], lr, now - began)
                log.take(record, writes=session.view.rank == 0)
                began = now
        return PREEMPTED if session.stopped and not session.left else DONE


def _notices(conf: RunConf) -> Notices:
    """Where this rank hears that its machine will be taken away."""
    elastic, grace_s = conf.elastic, conf.launcher.grace_s
    if "SLURM_JOB_ID" in os.environ:
        sources: list[Source] = slurm(grace_s=grace_s)
    else:
        sources = [OnSignal(signal.SIGTERM, grace_s)]
    if elastic.notice_file is not None:
        path = elastic.notice_file.replace("{rank}", os.environ.get("RANK", "0"))
        sources.append(OnFile(path, grace_s))
    if elastic.notice_url is not None:
        sources.append(OnPoll(url_notice(elastic.notice_url), grace_s=grace_s))
    return Notices(*sources)


class _Metrics:
    """Whoever is rank 0 writes; who becomes rank 0 writes what the one before has left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._recent: deque[StepRecord] = deque(maxlen=_KEPT)
        self._writer: MetricsWriter | None = None

    def take(self, record: StepRecord, *, writes: bool) -> None:
        """Notes a step that was committed."""
        self._recent.append(record)
        if not writes:
            return
        if self._writer is None:
            written = max((r.step for r in read(self._path)), default=0)
            self._writer = MetricsWriter(self._path)
            for missing in list(self._recent)[:-1]:
                if missing.step > written:
                    self._writer.write(missing)
        self._writer.write(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
