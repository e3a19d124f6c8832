"""Chooses a rank's number of CPU threads by timing training passes: small models are fastest with one.

    1, 2, 4, ... all CPUs ─► a few passes with each ─► the smallest number that is about as fast as the fastest

The number changes results by rounding only. It depends on timing, so the driver records it (`learner.driver.threads`).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

from common import seeding
from common.types import Network
from learner.training.networks import Networks

BUDGET_S = 2.0
"""Seconds of the whole probe. The pass that exceeds it is the last one."""
MARGIN = 1.1
"""A number of threads is about as fast as the fastest if it takes at most this many times as long."""
SIGMA = 0.5


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def training_pass(networks: Networks, batch_size: int) -> Callable[[], None]:
    """A forward and a backward pass of the student on fixed inputs, which leave no trace in the networks."""
    backbone = networks.backbone
    shape = (batch_size, *backbone.latent_shape)
    latents_Bchw = seeding.normal(shape, seed=0, purpose="thread probe").to(backbone.device)
    conditioning = backbone.encode_prompts([""]).repeat(batch_size)
    parameters = list(backbone.adapters.parameters(networks.student_adapter).values())

    def one_pass() -> None:
        velocity = backbone.velocity(Network.STUDENT, latents_Bchw, torch.full((batch_size,), SIGMA), conditioning)
        torch.autograd.grad(velocity.square().mean(), parameters, allow_unused=True)

    return one_pass


def timed_passes(
    one_pass: Callable[[], None],
    cpus: int,
    use: Callable[[int], None] = torch.set_num_threads,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Median seconds of a pass by the number of threads.

    The largest number comes first: where one pass takes longer than the whole budget, no other number is tried.
    """
    numbers = sorted({*(2**power for power in range(cpus.bit_length())), cpus}, reverse=True)
    started, seconds = clock(), dict[int, float]()
    for place, threads in enumerate(numbers, 1):
        use(threads)
        passes, until = list[float](), started + BUDGET_S * place / len(numbers)
        while not passes or clock() < until:
            before = clock()
            one_pass()
            passes.append(clock() - before)
        # The first one may include allocations and the start of threads.
        seconds[threads] = statistics.median(passes[1:] or passes)
        if clock() >= started + BUDGET_S:
            break
    return seconds


def best_number(seconds: Mapping[int, float]) -> int:
    """The smallest number of threads whose pass takes at most `MARGIN` times the fastest."""
    fastest = min(seconds.values())
    return min(threads for threads, taken in seconds.items() if taken <= MARGIN * fastest)
