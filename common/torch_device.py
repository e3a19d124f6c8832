"""The check of a torch device that a command line names."""

from __future__ import annotations

import torch

from common.errors import ConfigError, one_line

SHORT = 300
"""torch lists every kind of device that it was ever built for."""


def require_device(device: str) -> None:
    """ConfigError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # without CUDA support torch raises AssertionError
        message = f"--device {device} cannot be used: {one_line(error, SHORT)}"
        raise ConfigError(f"{message}; usable here: {', '.join(devices())}") from error


def devices() -> list[str]:
    """The devices of this machine that torch can use: `cpu`, then each GPU as cuda:N. Nothing is started on a GPU."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
