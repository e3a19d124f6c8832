"""Training of the zoo's transformers, for any family: optimizers, learning rate, moving average, noise levels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Model = TypeVar("Model", bound=nn.Module)

WARMUP_STEPS = 100
CONSTANT_FRACTION = 0.3
"""This fraction of the training has the full learning rate, which then falls linearly to zero."""
CAPTION_DROPOUT = 0.1
"""This fraction of the samples is trained without a caption, for classifier-free guidance."""


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, and the decay of the weights' moving average."""

    matrices: float = 1e-2
    """Muon's rate, for the matrices of the transformer blocks: it needs about a third fewer steps than AdamW."""
    others: float = 2e-3
    """AdamW's rate, for everything else."""
    ema_decay: float = 0.998


def train_averaged(
    model: Model,
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    rates: Rates,
    keep: Callable[[int, Model], None] | None = None,
) -> Model:
    """Minimise the loss of random batches; return a copy of the model with the moving average of its weights.

    `keep` gets that copy at every 250th step, for example to save it.
    """
    average = copy.deepcopy(model)
    optimizers = new_optimizers(model, rates)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(steps)) for optimizer in optimizers]
    started, running = time.monotonic(), None
    for step in range(steps):
        loss = loss_of_batch()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        # A low decay at first, so that the untrained weights are soon forgotten.
        decay = min(rates.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 250 == 0:
            print(f"{type(model).__name__} {step} loss {running:.4f} {time.monotonic() - started:.0f} s", flush=True)
            if keep is not None:
                keep(step, average)
    return average.eval().requires_grad_(False)


def new_optimizers(model: nn.Module, rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, rates.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rates.others, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


def rate_factor(steps: int) -> Callable[[int], float]:
    """Learning rate of a step, as a fraction of its peak."""

    def factor(step: int) -> float:
        if step < steps * CONSTANT_FRACTION:
            return min(1.0, (step + 1) / WARMUP_STEPS)
        return (steps - step) / (steps * (1 - CONSTANT_FRACTION))

    return factor


@contextmanager
def half_precision() -> Iterator[None]:
    """Forward passes in bfloat16, with plain attention.

    In bfloat16 on a CPU the backward pass of fused attention takes six times as long, which is half of a training step.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def training_sigma(count: int, shift: float) -> Tensor:
    """Half the noise levels logit-normal (as in SD3), half uniform in the shifted schedule used for sampling."""
    uniform = torch.rand(count - count // 2)
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return torch.cat([torch.sigmoid(torch.randn(count // 2)), shifted])
