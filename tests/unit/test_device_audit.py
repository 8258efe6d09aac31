"""The device's side of the audit, on host memory: the same code, without streams."""

import torch

from planaria.checkpoint.capture.device_audit import DeviceWindows
from planaria.checkpoint.capture.sources import Source


def windows_over(tensors: dict[str, torch.Tensor]) -> DeviceWindows:
    places = [(n, s := Source(t), 0, s.nbytes) for n, t in tensors.items()]
    return DeviceWindows(torch.device("cpu"), places)


def test_nothing_changed() -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.float64),
        "b": torch.randn(5, 3).T,
        "c": torch.ones(3, dtype=torch.bool),
        "d": torch.randn(4).to(torch.bfloat16),
    }
    assert windows_over(tensors).changed() == []


def test_every_changed_tensor_is_named() -> None:
    tensors = {f"t{i}": torch.randn(3 + i) for i in range(5)}
    windows = windows_over(tensors)
    tensors["t1"].numpy()[0] += 1  # behind the version counter's back
    tensors["t4"].data.mul_(2)
    assert windows.changed() == ["t1", "t4"]
