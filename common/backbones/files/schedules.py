"""Noise levels of a pipeline, from its scheduler's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.backbones.files.pipeline_files import PipelineFiles
from common.flow import exponential_shift_sigmas, linear_mu, static_shift_sigmas

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""The scheduler of every published pipeline of the families. Other classes have other noise levels or other solvers."""
NUMBERS = {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
"""The class's keys that our schedule uses, with the class's defaults."""
ONLY = {
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": 0,
    "prediction_type": "flow_prediction",
}
"""The keys of which one value is supported. It means the same as the class's default."""
SWITCH = "use_dynamic_shifting"


def scheduler_config(files: PipelineFiles) -> Mapping[str, Any]:
    """Read the scheduler's configuration.

    A key that is null or false is off, so it may be one that the class of today does not have.

    Raises:
        ModelError: its class, or a key that could change the schedule, is not supported.
    """
    config = files.config("scheduler")
    remedy = f"save the pipeline with a {SCHEDULER}, whose shift is called `shift`"
    for kind in (files.index["scheduler"][1], config.get("_class_name", SCHEDULER)):
        if kind != SCHEDULER:
            raise files.broken(f"its scheduler is a {kind}, and only {SCHEDULER} is supported: {remedy}")
    for name, value in config.items():
        if not _supported(name, value):
            raise files.broken(f"its scheduler has {name} = {value}, which is not supported: {remedy}, without {name}")
    first, last = "base_image_seq_len", "max_image_seq_len"
    if config.get(SWITCH) and _number(config, first) == _number(config, last):
        raise files.broken(
            f"its scheduler has {first} = {last} = {_number(config, first)}, and its shift is a line through both: set "
            f"them apart, such as {NUMBERS[first]} and {NUMBERS[last]}"
        )
    return config


def _supported(name: str, value: object) -> bool:
    if name in NUMBERS:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return value > 0 or name != "shift"
    return name == SWITCH or name.startswith("_") or ONLY.get(name) == value or value is None or value is False


def pipeline_sigmas(config: Mapping[str, Any], num_steps: int, mu: float) -> tuple[float, ...]:
    """num_steps + 1 levels from 1 to 0; `mu` is used only if the shift depends on the resolution."""
    if config.get(SWITCH):
        return exponential_shift_sigmas(num_steps, mu)
    return static_shift_sigmas(num_steps, _number(config, "shift"))


def linear_mu_of(config: Mapping[str, Any], image_tokens: int) -> float:
    """mu of SD3's and FLUX.1's resolution-dependent shift; 0 where the shift does not depend on the resolution."""
    if not config.get(SWITCH):
        return 0.0
    return linear_mu(
        image_tokens,
        tokens=(_number(config, "base_image_seq_len"), _number(config, "max_image_seq_len")),
        shifts=(_number(config, "base_shift"), _number(config, "max_shift")),
    )


def _number(config: Mapping[str, Any], name: str) -> Any:
    return config.get(name, NUMBERS[name])
