"""The check of a torch device that a command line names, and the memory that this process uses of a device."""

from __future__ import annotations

import resource

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


def release_cached(device: torch.device) -> None:
    """Give the memory that torch keeps on a GPU without using it to the GPU's other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: what torch has allocated on a GPU, or without a GPU the process's own memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
