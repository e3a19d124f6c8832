from __future__ import annotations

import torch

from benchmarks.counting import DEVICE, counted
from common.backbones.device.transfer import to_device


def test_on_the_cpu_a_tensor_stays_as_it_is() -> None:
    tensor = torch.ones(2)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_a_copy_does_not_wait_for_the_kernels_before_it() -> None:
    tensor, busy = torch.ones(2, 3), torch.empty(2, device=DEVICE)
    found = counted(lambda: (busy.exp(), to_device(tensor, DEVICE), busy.exp()))
    assert (found.copies, found.waits) == (1, 0)
