"""Noise levels of a pipeline, from its scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.backbones.files.pipeline_files import PipelineFiles
from common.flow import exponential_shift_sigmas, linear_mu, static_shift_sigmas

UNSUPPORTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
"""These options select other schedules of the scheduler's class; no supported family uses them."""


def scheduler_config(files: PipelineFiles) -> Mapping[str, Any]:
    """Read the scheduler's configuration.

    Raises:
        ModelError: it asks for an unsupported schedule.
    """
    config = files.config("scheduler")
    for name in UNSUPPORTED:
        if config.get(name):
            raise files.broken(f"its scheduler has {name} = {config[name]}, which is not supported")
    if config.get("time_shift_type", "exponential") != "exponential":
        raise files.broken(f"its scheduler has time_shift_type = {config['time_shift_type']}, not exponential")
    return config


def pipeline_sigmas(config: Mapping[str, Any], num_steps: int, mu: float) -> tuple[float, ...]:
    """num_steps + 1 levels from 1 to 0; `mu` is used only if the shift depends on the resolution."""
    if config.get("use_dynamic_shifting"):
        return exponential_shift_sigmas(num_steps, mu)
    return static_shift_sigmas(num_steps, config.get("shift", 1.0))


def linear_mu_of(config: Mapping[str, Any], image_tokens: int) -> float:
    """mu of SD3's and FLUX.1's resolution-dependent shift."""
    return linear_mu(
        image_tokens,
        tokens=(config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
        shifts=(config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
    )
