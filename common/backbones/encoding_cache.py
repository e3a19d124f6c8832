"""Prompts that are encoded alone are encoded once: workers sample the same prompts again and again.

Prompts of a batch are not kept: the other prompts change an encoding by rounding, so a resumed run would differ from
one that was not interrupted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from common.backbones.base import Conditioning
from common.backbones.device.transfer import to_device

KEPT_BYTES = 2**29
"""Host memory for encodings: about 190 prompts of SD3.5, or 65 of FLUX.2."""


class EncodingCache:
    """Encodings by prompt, in host memory. Those that were not used for longest make room for new ones."""

    def __init__(self, device: torch.device, kept_bytes: int = KEPT_BYTES) -> None:
        self._device = device
        self._free = kept_bytes
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, text: str, encode: Callable[[], Conditioning]) -> Conditioning:
        """The encoding of `text` on the device; `encode` makes it if it is not kept."""
        kept = self._kept.get(text)
        if kept is None:
            made = encode()
            self._keep(text, _copied(made, torch.device("cpu")))
            return made
        self._kept.move_to_end(text)
        return _copied(kept, self._device)

    def _keep(self, text: str, encoding: Conditioning) -> None:
        self._kept[text] = encoding
        self._free -= _bytes(encoding)
        while self._free < 0:
            _, dropped = self._kept.popitem(last=False)
            self._free += _bytes(dropped)


def _copied(encoding: Conditioning, device: torch.device) -> Conditioning:
    """A copy on a device, so that nobody who has one changes another."""
    tensors = encoding.tensors.items()
    if device.type == "cpu":
        return Conditioning({name: tensor.to(device, copy=True).contiguous() for name, tensor in tensors})
    return Conditioning({name: to_device(tensor, device) for name, tensor in tensors})


def _bytes(encoding: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in encoding.tensors.values())
