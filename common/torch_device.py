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
        raise ConfigError(
            f"{message}; cpu can everywhere, cuda where there is a GPU and a torch built for it"
        ) from error
