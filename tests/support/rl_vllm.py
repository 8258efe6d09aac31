"""A local double of vLLM's weight transfer: the same classes, signatures and order of calls.

Written after the published interface (vllm.distributed.weight_transfer, documentation of 0.25 to
0.32); only what an engine touches is there.
"""

import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

I = TypeVar("I")  # noqa: E741
U = TypeVar("U")


@dataclass
class WeightTransferInitInfo(ABC):  # noqa: B024
    pass


@dataclass
class WeightTransferUpdateInfo(ABC):  # noqa: B024
    pass


class WeightTransferEngine(ABC, Generic[I, U]):
    init_info_cls: type
    update_info_cls: type

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        self.config, self.vllm_config = config, vllm_config
        self.parallel_config = vllm_config.parallel_config
        self.device, self.model = device, model

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        try:
            return self.init_info_cls(**init_dict)
        except TypeError as error:
            raise ValueError(f"Invalid init_info: {error}") from error

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        try:
            return self.update_info_cls(**update_dict)
        except TypeError as error:
            raise ValueError(f"Invalid update_info: {error}") from error

    @abstractmethod
    def init_transfer_engine(self, init_info: I) -> None: ...
    @abstractmethod
    def start_weight_update(self) -> None: ...
    @abstractmethod
    def finish_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    @abstractmethod
    def receive_weights(self, update_info: U) -> None: ...
    @abstractmethod
    def shutdown(self) -> None: ...
    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None: ...


class WeightTransferEngineFactory:
    _registry: dict[str, Any] = {}

    @classmethod
    def register_engine(cls, name: str, module_path_or_cls: Any, class_name: Any = None) -> None:
        if name in cls._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        cls._registry[name] = module_path_or_cls

    @classmethod
    def create_engine(cls, config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
        return cls._registry[config.backend](config, vllm_config, device, model)


@dataclass
class ParallelConfig:
    tensor_parallel_size: int = 1


@dataclass
class VllmConfig:
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    model_config: Any = None


@dataclass
class WeightTransferConfig:
    backend: str = "nccl"


class Worker:
    """One worker of an engine: makes its transfer engine and passes the four calls on."""

    def __init__(self, model: torch.nn.Module, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        config = VllmConfig(ParallelConfig(size))
        self.engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig("planaria"), config, torch.device("cpu"), model
        )

    def init(self, info: dict[str, Any]) -> None:
        # In vLLM each worker is a process of its own, and this a function of the process.
        parallel: Any = sys.modules["vllm.distributed.parallel_state"]
        parallel.get_tensor_model_parallel_rank = lambda: self.rank
        self.engine.init_transfer_engine(self.engine.parse_init_info(info["init_info"]))

    def update(self, info: dict[str, Any]) -> None:
        self.engine.start_weight_update()
        self.engine.update_weights(info["update_info"])
        self.engine.finish_weight_update()


@contextmanager
def installed() -> Iterator[None]:
    """Puts the double in vLLM's place."""
    names = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer",
             "vllm.distributed.weight_transfer.base", "vllm.distributed.weight_transfer.factory",
             "vllm.distributed.parallel_state"]  # fmt: skip
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for cls in (WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo):
        setattr(sys.modules[names[3]], cls.__name__, cls)
    sys.modules[names[4]].WeightTransferEngineFactory = WeightTransferEngineFactory  # type: ignore[attr-defined]
    WeightTransferEngineFactory._registry = {}
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
