"""Adapters: HF generate, vLLM's interface by its double, the status on the command line."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_models import nudge, rollout, same, trainer
from rl_vllm import Worker, installed
from torch import nn

from planaria import telemetry
from planaria.errors import ConfigError, NotSupportedError, StaleError, SyncError
from planaria.rl_sync import Publisher, RolloutLayout
from planaria.rl_sync.__main__ import main
from planaria.rl_sync.adapters import vllm
from planaria.rl_sync.adapters.hf import GenerateWorker, plain_tensors

BF16 = torch.bfloat16


class Layer(nn.Module):
    """A layer with transformers' names (or, fused, with vLLM's)."""

    def __init__(self, fused: int = 0) -> None:
        super().__init__()
        n = fused or 1
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        if fused:
            self.self_attn.qkv_proj = nn.Linear(8, 16 // n, bias=False)
            self.mlp.gate_up_proj = nn.Linear(8, 24 // n, bias=False)
        else:
            self.self_attn.q_proj = nn.Linear(8, 8, bias=False)
            self.self_attn.k_proj = nn.Linear(8, 4, bias=False)
            self.self_attn.v_proj = nn.Linear(8, 4, bias=False)
            self.mlp.gate_proj = nn.Linear(8, 12, bias=False)
            self.mlp.up_proj = nn.Linear(8, 12, bias=False)
        self.self_attn.o_proj = nn.Linear(8 // n, 8, bias=False)
        self.mlp.down_proj = nn.Linear(12 // n, 8, bias=False)
        self.input_layernorm = nn.LayerNorm(8, bias=False)


class Llama(nn.Module):
    def __init__(self, fused: int = 0) -> None:
        super().__init__()
        n = fused or 1
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10 // n, 8)
        self.model.layers = nn.ModuleList(Layer(fused) for _ in range(2))
        self.lm_head = nn.Linear(8, 10 // n, bias=False)


@pytest.mark.parametrize("size", [1, 2])
def test_vllm_engine_on_its_double(size: int) -> None:
    torch.manual_seed(0)
    model = Llama()
    layout = vllm.llama_like(size)
    with (
        installed(),
        Publisher(model, "tcp://127.0.0.1:0", dtype=BF16, layout=layout) as publisher,
    ):
        vllm.engine_class.cache_clear()
        vllm.register()
        theirs = [Llama(fused=size).to(BF16) for _ in range(size)]
        workers = [Worker(m, rank, size) for rank, m in enumerate(theirs)]
        with pytest.raises(SyncError, match="init_weight_transfer_engine"):
            workers[0].update({"update_info": {}})
        for worker in workers:
            worker.init({"init_info": {"url": publisher.url, "timeout": 20.0}})
        for version in range(3):
            nudge(model, version)
            publisher.publish(version)
            for worker in workers:
                worker.update({"update_info": {"version": version}})
                assert worker.engine.subscriber.version == version
        for rank, there in enumerate(theirs):
            full = {k: v.to(BF16).chunk(size)[rank] for k, v in model.state_dict().items()}
            layer: Any = there.model.layers[1]  # type: ignore[union-attr, index]
            name = "model.layers.1.self_attn"
            qkv = torch.cat([full[f"{name}.{n}_proj.weight"] for n in "qkv"])
            assert torch.equal(layer.self_attn.qkv_proj.weight, qkv)
            o = model.state_dict()[f"{name}.o_proj.weight"].to(BF16).chunk(size, 1)[rank]
            assert torch.equal(layer.self_attn.o_proj.weight, o)
            assert torch.equal(there.lm_head.weight, full["lm_head.weight"])
        with pytest.raises(ValueError, match="Invalid update_info"):
            workers[0].update({"update_info": {"step": 1}})
        with pytest.raises(StaleError):
            workers[0].update({"update_info": {"version": 9, "timeout": 0.2}})
        with pytest.raises(NotSupportedError, match="Publisher"):
            workers[0].engine.trainer_send_weights(iter(()), {})
        for worker in workers:
            worker.engine.shutdown()


class Generator(nn.Module):
    """As transformers' models: a forward for each token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def generate(self, tokens: torch.Tensor, steps: int, between: object = None) -> list[float]:
        seen = []
        for _ in range(steps):
            self(tokens)
            seen.append(float(self.model.norm.weight[0].detach()))  # type: ignore[union-attr, index]
            if callable(between):
                between()
        return seen


@pytest.mark.parametrize("boundary", ["request", "token"])
def test_where_the_weights_of_generate_may_change(boundary: str) -> None:
    source = trainer()
    wrapped, there = Generator(source), Generator(rollout(source))
    with (
        Publisher(wrapped, "tcp://127.0.0.1:0", dtype=BF16) as publisher,
        GenerateWorker(there, publisher.url, boundary=boundary, timeout=60) as worker,
    ):
        publisher.publish(0)
        with pytest.raises(StaleError):
            worker.generate(torch.zeros(1, 2, dtype=torch.int64), 1)
        worker.update()
        with torch.no_grad():
            for p in source.norm.parameters():
                p += 1
        publisher.publish(1)
        started = threading.Event()
        swapper = threading.Thread(target=lambda: (started.wait(60), worker.update()))
        swapper.start()

        def between() -> None:
            started.set()
            if boundary == "token":
                swapper.join(60)

        made = worker.generate(torch.zeros(1, 2, dtype=torch.int64), 3, between)
        swapper.join(60)
        if boundary == "request":
            assert made.output == [1.0, 1.0, 1.0]
            assert (made.first_version, made.last_version) == (0, 0)
        else:
            assert made.output == [1.0, 2.0, 2.0]
            assert (made.first_version, made.last_version) == (0, 1)
        assert same(source, there.model)
    with pytest.raises(ConfigError, match="boundary"):
        GenerateWorker(there, publisher.url, boundary="never")
    with pytest.raises(ConfigError, match="no generate"):
        GenerateWorker(source, publisher.url)


def test_names_behind_an_adapters_wrapper() -> None:
    inner = trainer()

    class Peft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = inner

    assert set(plain_tensors(Peft())) == {n for n, _ in inner.named_parameters()} | {
        "scale", "head.weight"
    }  # fmt: skip


def test_hf_generate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(config)
    torch.manual_seed(1)
    there = transformers.LlamaForCausalLM(config)
    prompt = torch.tensor([[1, 2, 3]])
    ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with (
        Publisher(source, "tcp://127.0.0.1:0") as publisher,
        GenerateWorker(there, publisher.url) as worker,
    ):
        for version in range(3):
            nudge(source, version, size=0.05)
            publisher.publish(version)
            worker.update(at_least=version)
            made = worker.generate(prompt, **ask)
            assert made.first_version == version
            assert torch.equal(made.output, source.generate(prompt, **ask))
        assert there.lm_head.weight is there.model.embed_tokens.weight


def test_status_on_the_command_line_and_as_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trainer()
    url = str(tmp_path / "versions")
    telemetry.configure(tmp_path / "telemetry")
    try:
        with (
            Publisher(model, ["tcp://127.0.0.1:0", url], dtype=BF16) as publisher,
            GenerateWorker(Generator(rollout(model)), publisher.url, worker="a", only=None) as _,
        ):
            publisher.publish(0)
            from planaria.rl_sync import Subscriber

            with Subscriber(rollout(model), publisher.url, worker="one") as subscriber:
                subscriber.update()
                Subscriber(rollout(model), url, worker="two").update()
                nudge(model, 1)
                publisher.publish(1)
                for place, worker in ((publisher.url, "one"), (url, "two")):
                    assert main([place, "--json"]) == 0
                    found = json.loads(capsys.readouterr().out)
                    assert found["version"] == 1
                    row = next(r for r in found["workers"] if r["worker"] == worker)
                    assert (row["version"], row["lag"], row["codec"]) == (0, 1, "dense")
                assert main([publisher.url]) == 0
                assert "newest version: 1" in capsys.readouterr().out
    finally:
        telemetry.close()
    names = {record["name"] for record in telemetry.read(tmp_path / "telemetry")}
    assert {"rl.publish", "rl.update", "rl.publish.bytes", "rl.worker.lag"} <= names
    assert main(["tcp://127.0.0.1:1", "--timeout", "0.3"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert RolloutLayout().shards == 1
