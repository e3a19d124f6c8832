"""Training loop of the zoo's small networks that read images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    net: nn.Module, name: str, loss_of_batch: Callable[[], Tensor], *, steps: int, rate: float, log_every: int
) -> None:
    """Minimise the loss of random batches, in place; the learning rate rises to `rate` and falls to zero."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % log_every == 0:
            print(f"{name} step {step} loss {loss.item():.4f}", flush=True)
