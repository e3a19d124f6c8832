"""Copies between the host and a device that do not wait for the work the device still has."""

from __future__ import annotations

import torch
from torch import Tensor

from common.types import FloatArray


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, with the same values; on the CPU the tensor itself.

    A copy from ordinary memory waits until all kernels that were started before it have run. One from pinned memory is
    itself a part of the device's queue.
    """
    if device.type == "cpu":
        return tensor
    if len(tensor) > 1 and tensor.stride(0) == 0:  # one part, expanded: a group's shared noise
        return to_device(tensor[:1], device).expand_as(tensor)
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which `to_device` copies at once; on the CPU the tensor itself."""
    if device.type == "cpu":
        return tensor
    if len(tensor) > 1 and tensor.stride(0) == 0:
        return pinned(tensor[:1], device).expand_as(tensor)
    return tensor.pin_memory()


class HostCopy:
    """A copy of a tensor on the host. It is a part of the device's queue, and any thread may wait for it."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy; on the CPU it is the tensor itself."""
        self._host = tensor.detach().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()

    def numpy(self) -> FloatArray:
        """The values, once they are here."""
        if self._copied is not None:
            self._copied.synchronize()
        values: FloatArray = self._host.numpy()
        return values


def wait_for(device: torch.device) -> None:
    """Wait until the device has run all that was started on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
