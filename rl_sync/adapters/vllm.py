"""vLLM: a backend of its weight transfer, by the published interface.

Register it in each worker (a vLLM plug-in, or before the engine is made), choose it with
``WeightTransferConfig(backend="planaria")`` and drive it with vLLM's own calls::

    register()
    llm.init_weight_transfer_engine({"init_info": {"url": "tcp://trainer:7070"}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"version": step}})
    llm.finish_weight_update()

Weights are written in place into vLLM's own parameters, so the publisher's `RolloutLayout` gives
them vLLM's names and parts (`llama_like` is one for models of Llama's and Qwen's kind) and its
degree of tensor parallelism. Weights that vLLM repacks after loading (quantised ones) cannot be
written so.

Tested against a local double of the interface, not against a live engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from planaria.checkpoint.layout.transforms import Fuse
from planaria.core.token import load_token
from planaria.errors import NotSupportedError, SyncError
from planaria.rl_sync.layout.rollout import RolloutLayout
from planaria.rl_sync.subscriber import Subscriber

_BASE = "vllm.distributed.weight_transfer.base"
_FACTORY = "vllm.distributed.weight_transfer.factory"
_PARALLEL = "vllm.distributed.parallel_state"


def llama_like(shards: int = 1, bias: bool = False) -> RolloutLayout:
    """The layout of vLLM's models of Llama's and Qwen's kind.

    Args:
        shards: vLLM's tensor parallel size; it must divide the number of key-value heads.
        bias: Whether q, k and v have biases (Qwen 2).
    """
    at = "model.layers.*."
    fused = [
        Fuse([f"{at}self_attn.{n}_proj.weight" for n in "qkv"], f"{at}self_attn.qkv_proj.weight"),
        Fuse([f"{at}mlp.{n}_proj.weight" for n in ("gate", "up")], f"{at}mlp.gate_up_proj.weight"),
    ]
    if bias:
        names = [f"{at}self_attn.{n}_proj.bias" for n in "qkv"]
        fused.append(Fuse(names, f"{at}self_attn.qkv_proj.bias"))
    cuts = {
        "*.qkv_proj.*": 0, "*.gate_up_proj.*": 0, "*.o_proj.weight": 1, "*.down_proj.weight": 1,
        "model.embed_tokens.weight": 0, "lm_head.weight": 0,
    }  # fmt: skip
    return RolloutLayout(fused, shards, cuts)


def register(name: str = "planaria") -> None:
    """Makes the backend known to vLLM in this process."""
    factory = importlib.import_module(_FACTORY).WeightTransferEngineFactory
    factory.register_engine(name, engine_class())


@cache
def engine_class() -> type:
    """The engine's class, a subclass of vLLM's `WeightTransferEngine`.

    Raises:
        ImportError: vLLM is not installed.
    """
    base = importlib.import_module(_BASE)

    @dataclass
    class InitInfo(base.WeightTransferInitInfo):
        """How to reach the publisher; `shard` is the tensor parallel rank if None."""

        url: str = ""
        shard: int | None = None
        worker: str | None = None
        timeout: float = 600.0

    @dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):
        """Which version is wanted; the newest one if None."""

        version: int | None = None
        timeout: float | None = None

    class PlanariaWeightTransferEngine(base.WeightTransferEngine):
        """Follows a `planaria.rl_sync.Publisher`."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        subscriber: Subscriber | None = None
        _wanted: int | None = None

        def init_transfer_engine(self, init_info: Any) -> None:
            shard = self._tensor_rank() if init_info.shard is None else init_info.shard
            self.subscriber = Subscriber(
                self.model, init_info.url, load_token(), shard=shard, worker=init_info.worker,
                timeout=init_info.timeout,
            )  # fmt: skip

        def start_weight_update(self) -> None:
            self._wanted = None

        def receive_weights(self, update_info: Any) -> None:
            self._wanted = update_info.version
            self._connected().update(at_least=update_info.version, timeout=update_info.timeout)

        def finish_weight_update(self) -> None:
            served = self._connected().version
            if self._wanted is not None and (served is None or served < self._wanted):
                raise SyncError(f"version {self._wanted} was wanted, and {served} is served")

        def shutdown(self) -> None:
            if self.subscriber is not None:
                self.subscriber.close()
                self.subscriber = None

        @staticmethod
        def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
            raise NotSupportedError(
                "the trainer sends by planaria.rl_sync.Publisher(model, url).publish(version)"
            )

        def _connected(self) -> Subscriber:
            if self.subscriber is None:
                raise SyncError("init_weight_transfer_engine comes first")
            return self.subscriber

        def _tensor_rank(self) -> int:
            if self.parallel_config.tensor_parallel_size == 1:
                return 0
            return importlib.import_module(_PARALLEL).get_tensor_model_parallel_rank()

    return PlanariaWeightTransferEngine
