"""Every random draw is a pure function of a key: the run's seed, a purpose, and integers.

So the number, order and placement of workers cannot change a run, and any draw can be repeated on its own.

The key's text is hashed (blake2b) to the 128-bit key of a counter-based generator (Philox), drawn on the CPU in
float32. numpy is used instead of torch for two reasons: torch's CPU generator keeps only the low 32 bits of a seed, so
two of a run's 10^5 draws would probably be equal; and its normal draws depend on the machine's vector instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _generator(seed: int, purpose: str, keys: dict[str, int]) -> np.random.Generator:
    # Sorted, so that the order of a caller's keys does not matter; int(), so that numpy integers give the same text.
    text = "|".join([f"seed={int(seed)}", f"purpose={purpose}", *(f"{k}={int(keys[k])}" for k in sorted(keys))])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


# ── primitives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def normal(shape: Sequence[int], *, seed: int, purpose: str, **keys: int) -> Tensor:
    """Standard normal float32 tensor on the CPU."""
    return torch.from_numpy(_generator(seed, purpose, keys).standard_normal(tuple(shape), dtype=np.float32))


def uniform(shape: Sequence[int], *, seed: int, purpose: str, **keys: int) -> Tensor:
    """Float32 tensor on the CPU, uniform in [0, 1)."""
    return torch.from_numpy(_generator(seed, purpose, keys).random(tuple(shape), dtype=np.float32))


def sample_indices(population: int, count: int, *, seed: int, purpose: str, **keys: int) -> tuple[int, ...]:
    """`count` different integers from range(population), in random order.

    Raises:
        ValueError: count is negative or larger than the population.
    """
    if not 0 <= count <= population:
        raise ValueError(f"cannot draw {count} different indices from {population} ({purpose})")
    return tuple(int(index) for index in _generator(seed, purpose, keys).permutation(population)[:count])


def generator_seed(*, seed: int, purpose: str, **keys: int) -> int:
    """A seed in [0, 2^63) for another library's generator."""
    return int(_generator(seed, purpose, keys).integers(2**63))


# ── the draws of a run ───────────────────────────────────────────────────────────────────────────────────────────────


def initial_noise_Gchw(
    seed: int,
    iteration: int,
    prompt_index: int,
    group_size: int,
    shape_chw: Sequence[int],
    *,
    shared: bool = False,
) -> Tensor:
    """State 0 of a group, [G, c, h, w]. Sample g depends on g but not on the group's size.

    shared: all have that of sample 0.
    """
    if shared:
        return initial_noise_Gchw(seed, iteration, prompt_index, 1, shape_chw).expand(group_size, *shape_chw)
    return torch.stack(
        [
            normal(shape_chw, seed=seed, purpose="initial", iteration=iteration, prompt=prompt_index, sample=sample)
            for sample in range(group_size)
        ]
    )


def step_noise_Gchw(
    seed: int,
    plan_iteration: int,
    prompt_index: int,
    step: int,
    group_size: int,
    shape_chw: Sequence[int],
    shared: bool,
) -> Tensor:
    """The CPS noise of one step of a group, [G, c, h, w].

    shared: one draw, a function of (iteration, prompt, step) alone, expanded over the group without a copy
    (SubGRPO's unselected steps). Otherwise each sample has its own draw, independent of the group's size.
    """
    keys = {"iteration": plan_iteration, "prompt": prompt_index, "step": step}
    if shared:
        noise_chw = normal(shape_chw, seed=seed, purpose="shared_step", **keys)
        return noise_chw.expand(group_size, *shape_chw)
    return torch.stack(
        [normal(shape_chw, seed=seed, purpose="step", sample=sample, **keys) for sample in range(group_size)]
    )


def selected_steps(seed: int, iteration: int, stochastic_steps: int, count: int) -> tuple[int, ...]:
    """The stochastic steps, out of 0 .. stochastic_steps - 1, trained in this iteration, ascending (SubGRPO)."""
    return tuple(sorted(sample_indices(stochastic_steps, count, seed=seed, purpose="selected", iteration=iteration)))


def trained_steps(seed: int, iteration: int, steps: int, count: int) -> tuple[int, ...]:
    """The steps, out of all of a rollout, at whose levels the student trains, ascending (DiffusionNFT, TDM-R1)."""
    return tuple(sorted(sample_indices(steps, count, seed=seed, purpose="trained_steps", iteration=iteration)))


def shuffled_group(seed: int, iteration: int, prompt_index: int, group_size: int) -> tuple[int, ...]:
    """A random order of a group's samples: the control in which advantages say nothing about their samples."""
    keys = {"iteration": iteration, "prompt": prompt_index}
    return sample_indices(group_size, group_size, seed=seed, purpose="shuffled_advantages", **keys)


def prompt_indices(seed: int, iteration: int, count: int, num_prompts: int) -> tuple[int, ...]:
    """The prompts of one iteration, all different.

    An epoch is num_prompts // count iterations over one shuffle: no prompt occurs twice within it. The remainder of a
    shuffle is left out and not carried into the next epoch: there an iteration could get a prompt twice and sample the
    same images twice, because noise is keyed by prompt.

    Raises:
        ValueError: count is below 1 or above num_prompts.
    """
    if not 1 <= count <= num_prompts:
        raise ValueError(f"cannot take {count} different prompts an iteration from {num_prompts}")
    epoch, position = divmod(iteration, num_prompts // count)
    order = sample_indices(num_prompts, num_prompts, seed=seed, purpose="prompts", epoch=epoch)
    return order[position * count : (position + 1) * count]
