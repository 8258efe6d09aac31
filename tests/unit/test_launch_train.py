"""The default job's loop, in one process: the gradient and the learning rate."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from planaria.checkpoint.memory import communicating
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.errors import ConfigError
from planaria.launch import worker
from planaria.launch.config import OptimConf, RunConf
from planaria.launch.demo import train
from planaria.launch.demo.build import Place, build, device_of, lr_factor
from planaria.launch.demo.train import accumulate
from planaria.launch.run_folder import RunFolder


@given(
    warmup=st.integers(0, 50), total=st.integers(1, 300), floor=st.floats(0.0, 0.9), data=st.data()
)
def test_the_learning_rate_rises_falls_and_stays(warmup, total, floor, data):
    optim = OptimConf(warmup_steps=warmup, min_lr_ratio=floor)
    step = data.draw(st.integers(0, 400))
    here, next_ = lr_factor(optim, step, total), lr_factor(optim, step + 1, total)
    assert 0 < here <= 1 + 1e-12 or floor == 0
    if step + 1 < min(warmup, total):
        assert here < next_
    elif step >= warmup:
        assert next_ <= here + 1e-12
    if step >= max(total, warmup):
        assert here == floor


@pytest.fixture
def conf():
    conf = RunConf(steps=2)
    conf.model.dim, conf.model.layers, conf.model.heads, conf.model.ffn_dim = 16, 1, 2, 16
    conf.data.max_bytes, conf.data.seq_len = 50_000, 8
    conf.data.batch_size, conf.data.micro_batch_size = 6, 2
    return conf


def gradient(
    conf, rank: int, world_size: int, monkeypatch
) -> tuple[float, dict[str, torch.Tensor]]:
    """What one rank adds, as it would hand it to the others."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: None)
    alone = Place(0, 1, torch.device("cpu"))
    model, _, _, data = build(conf, alone)
    loss = accumulate(model, data, 1, conf, Place(rank, world_size, torch.device("cpu")))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, grads


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradient_does_not_depend_on_who_computes_it(conf, monkeypatch, dropout):
    conf.model.dropout = dropout
    loss, whole = gradient(conf, 0, 1, monkeypatch)
    # Three micro-batches over two ranks: one of them has two.
    shares = [gradient(conf, rank, 2, monkeypatch) for rank in range(2)]
    assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-12)
    for name, expected in whole.items():
        mean = (shares[0][1][name] + shares[1][1][name]) / 2
        torch.testing.assert_close(mean, expected)


def test_the_gradient_is_that_of_the_mean_loss(conf, monkeypatch):
    loss, grads = gradient(conf, 0, 1, monkeypatch)
    model, _, _, data = build(conf, Place(0, 1, torch.device("cpu")))
    batches = [batch for _, batch in data.micro_batches(1, 0, 1)]
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = model(tokens, targets).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_a_gpu_that_is_not_there_is_one_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        device_of("cuda", 0)
    assert device_of("auto", 0) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"launcher\.nproc=1"):
        device_of("auto", 1)


def test_the_worker_runs_the_default_job_by_its_name():
    assert train.__name__ == worker.DEFAULT_JOB


class Word:
    """Counts the collectives that it is told of."""

    begun = under_way = 0

    def begin(self) -> None:
        self.begun += 1
        self.under_way += 1

    def end(self) -> None:
        self.under_way -= 1


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PLANARIA_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir(0o700)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0,
                            world_size=1)  # fmt: skip
    yield RunFolder(tmp_path / "run")
    dist.destroy_process_group()


def told(conf, folder: RunFolder, monkeypatch) -> int:
    """Collectives of two steps that a node would be told of; as of two ranks, of which one runs."""
    monkeypatch.setattr(
        train, "memory_tier", lambda *_: MemoryTier(budget=8 << 20, losses=0, node="n")
    )
    folder.path.mkdir()
    word = Word()
    communicating.add(word)  # pyright: ignore[reportArgumentType]
    train.train(conf, folder, Place(0, 2, torch.device("cpu")))
    assert word.under_way == 0
    return word.begun


def test_the_collectives_of_a_warm_run_are_told_of(conf, one_rank, monkeypatch):
    # Each step: one bucket of gradients, and the loss.
    assert told(conf, one_rank, monkeypatch) == 4


def test_gradients_that_are_not_told_of_are_noticed(conf, one_rank, monkeypatch):
    monkeypatch.setattr(train, "mark_communication", lambda model: None)
    assert told(conf, one_rank, monkeypatch) == 2
