"""Settings that earlier versions saved, in today's keys.

Only the `config.yaml` of an earlier run is upgraded, so that the run can still be used. An old key in a run file is an
error that names the new key.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from common.urls import redis_url_fault

RENAMED: dict[tuple[str, ...], tuple[str, ...]] = {
    (stage, key): (f"{stage}.{key}_student", f"{stage}.{key}_fake")
    for stage in ("cold_start", "alignment")
    for key in ("weight_decay", "gradient_clip")
}
"""Old key -> the keys that took its place."""
REMOVED = {
    ("reward_client", "trusted_hosts"): "servers that sign their registration with the token get it, no others do",
}
"""Old key -> why it is no longer needed."""


def upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.yaml in today's keys.

    What is new is set to what the version that wrote the file did, but for `lora.targets: null`: a family's own targets
    have changed, so whoever loads weights takes the layers from them.
    """
    values = deepcopy(dict(saved))
    _drop_unusable(values)
    cold_start, alignment = values.get("cold_start", {}), values.get("alignment", {})
    if "weight_decay" not in alignment:
        return values
    for stage in (cold_start, alignment):
        for key in ("weight_decay", "gradient_clip"):
            if key in stage:
                stage[f"{key}_student"] = stage[f"{key}_fake"] = stage.pop(key)
    if "consistency_weight" in cold_start:
        alignment["consistency_weight"] = cold_start["consistency_weight"]
    cold_start["lora_init_std"] = alignment["lora_init_std"] = None
    backbone = values.get("backbone", {})
    has_own_teacher = backbone.get("teacher_path") is not None  # klein, which takes no guidance input
    if backbone.get("family") in ("flux1", "flux2") and not has_own_teacher and "guidance_scale" in backbone:
        # Teacher, student and fake score had one guidance input.
        backbone["student_guidance"] = backbone["guidance_scale"]
    return values


def _drop_unusable(values: Mapping[str, Any]) -> None:
    """Take out what was accepted and is refused today: keys that are gone, and the query of a Redis URL."""
    for section, key in REMOVED:
        values.get(section, {}).pop(key, None)
    redis = values.get("redis", {})
    if isinstance(redis.get("url"), str) and redis_url_fault(redis["url"]):
        redis["url"] = redis["url"].partition("?")[0]
