"""The audit's look at device memory: it waits for nothing and nothing waits for it.

What the windows hold is copied on the device itself, in stream order with training, and compared
there later, on a stream of its own. Only the capturing thread waits for the answer.
"""

import contextlib
from collections.abc import Sequence

import torch

from planaria.checkpoint.capture.sources import Source

#: Name, source, first byte and one past the last.
Place = tuple[str, Source, int, int]

_ALIGNMENT = 16


class DeviceWindows:
    """Windows of one device's memory, as they were when this was made.

    Args:
        device: The device.
        places: The windows.
    """

    def __init__(self, device: torch.device, places: Sequence[Place]) -> None:
        self._device, self._places = device, places
        self._before = self._gather()
        self._copied: torch.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()

    def changed(self) -> list[str]:
        """Names of the sources whose windows hold something else now."""
        with contextlib.ExitStack() as stack:
            if self._copied is not None:
                # Not the default stream: that would queue behind the whole backward.
                stream = torch.cuda.Stream(device=self._device)
                stream.wait_event(self._copied)
                stack.enter_context(torch.cuda.stream(stream))
            now = self._gather()
            if torch.equal(now, self._before):
                return []
            names, at = [], 0
            for name, _, start, stop in self._places:
                end = at + stop - start
                if not torch.equal(now[at:end], self._before[at:end]):
                    names.append(name)
                at = _aligned(end)
            return names

    def _gather(self) -> torch.Tensor:
        total = sum(_aligned(stop - start) for _, _, start, stop in self._places)
        # Zeroed, so that the gaps between windows compare equal, too.
        data, at = torch.zeros(total, dtype=torch.uint8, device=self._device), 0
        for _, source, start, stop in self._places:
            source.copy_to(data, at, start, stop)
            at = _aligned(at + stop - start)
        return data


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
