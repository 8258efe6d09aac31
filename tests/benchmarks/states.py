"""State that is saved and loaded, and the check that both are the same bits."""

import torch
from timing import NotMeasured
from torch import nn


class State:
    """Parameters of a module, which every library is given as the same tensors.

    Args:
        count: How many tensors.
        numel: Elements of each, float32.

    Attributes:
        module: Holds them.
        tensors: Name -> tensor, sharing its memory with the module's.
        nbytes: All of them together.
    """

    def __init__(self, count: int, numel: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.module = nn.Module()
        for i in range(count):
            values = torch.empty(numel).uniform_(-1, 1, generator=generator)
            self.module.register_parameter(f"p{i:05d}", nn.Parameter(values))
        self.tensors: dict[str, torch.Tensor] = {
            name: value.detach() for name, value in self.module.named_parameters()
        }
        self.nbytes = count * numel * 4

    def renew(self, by: int) -> None:
        """Changes every element."""
        torch._foreach_mul_(list(self.tensors.values()), 1.0 + 2.0 ** -(by % 20 + 1))

    def clear(self) -> None:
        """Overwrites every element, so that what was not loaded is found."""
        torch._foreach_mul_(list(self.tensors.values()), 0.0)
        torch._foreach_add_(list(self.tensors.values()), -7.0)

    def copy(self) -> dict[str, torch.Tensor]:
        """What it is now."""
        return {name: value.clone() for name, value in self.tensors.items()}

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        """Makes sure that it is this, bit for bit.

        Raises:
            NotMeasured: It is not; names a tensor.
        """
        for name, value in expected.items():
            same_bits(self.tensors[name], value, name)


def same_bits(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    """Makes sure that two tensors are equal, bit for bit.

    Raises:
        NotMeasured: They are not.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise NotMeasured(f"{name} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}")
    if not torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    ):
        raise NotMeasured(f"{name} is not what was saved")
