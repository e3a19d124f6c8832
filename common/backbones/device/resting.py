"""A frozen module that may rest in the host's memory, and is on its device only while it is used."""

from __future__ import annotations

import torch
from torch import nn


class Resting:
    """Moves a module between the host and its device. It never rests before `rest` is called."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """The module is on its device."""
        self._module = module
        self._device = device
        self._rests, self._is_here = False, True

    def rest(self) -> None:
        """Move the module to the host, from where `need` takes it."""
        self._rests = True
        self.need(False)

    def need(self, needed: bool) -> None:
        """Bring the module to its device, or back to the host."""
        if self._rests and needed != self._is_here:
            self._module.to(self._device if needed else "cpu")
            self._is_here = needed
