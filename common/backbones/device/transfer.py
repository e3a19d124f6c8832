"""Copies from the host to a device that do not wait for the work the device still has."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, with the same values; on the CPU the tensor itself.

    A copy from ordinary memory waits until all kernels that were started before it have run. One from pinned memory is
    itself a part of the device's queue.
    """
    if device.type == "cpu":
        return tensor
    if len(tensor) > 1 and tensor.stride(0) == 0:  # one part, expanded: a group's shared noise
        return to_device(tensor[:1], device).expand_as(tensor)
    return tensor.pin_memory().to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until the device has run all that was started on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
