"""The tiny random reward models of `reward_servers.tiny`, and random images."""

from __future__ import annotations

import numpy as np

from common.rewards.api import ByteArray
from reward_servers.tiny.clip import (
    CLIP_FEATURES,
    CONTEXT,
    END_TOKEN,
    HPS_SETTINGS,
    IMAGE_SIZE,
    VOCABULARY,
    hps_state,
    write_hps,
    write_pickscore,
    write_tokenizer,
)

__all__ = [
    "CLIP_FEATURES",
    "CONTEXT",
    "END_TOKEN",
    "HPS_SETTINGS",
    "IMAGE_SIZE",
    "VOCABULARY",
    "hps_state",
    "random_images",
    "write_hps",
    "write_pickscore",
    "write_tokenizer",
]


def random_images(count: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, seed: int = 0) -> ByteArray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
