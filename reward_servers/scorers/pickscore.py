"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): logit_scale.exp() * cosine of a fine-tuned CLIP, over 26.

The model directory is a transformers CLIPModel: config.json, model.safetensors and its tokenizer. Images and prompts
are prepared as by the CLIPProcessor of its release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from transformers import CLIPModel

from reward_servers.scorers.clip import ClipScorer, processor_tokens
from reward_servers.scorers.model_directory import load_pretrained, require_directory
from reward_servers.scorers.pixels import ImageRecipe
from reward_servers.scorers.processor import clip_processor, require_processor

SCORE_DIVISOR = 26.0
"""RTDMD divides raw PickScores by this: good images have 20 to 26, so the reward is about 0.8 to 1, as large as others.

A model trained at another temperature keeps the constant; adjust its reward weight instead.
"""


class PickScoreScorer(ClipScorer):
    """score = exp(logit_scale) cosine(image, prompt) / 26."""

    name = "pickscore"
    preprocess_version = "pickscore-2"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        model = load_pretrained(CLIPModel, directory)
        require_processor(directory, clip_processor(model.config.vision_config.image_size))
        recipe = ImageRecipe(model.config.vision_config.image_size, eight_bit=True, crop_offset=int)
        scale = float(model.logit_scale.detach().exp()) / SCORE_DIVISOR
        return cls(model, processor_tokens(model, directory), recipe, scale=scale, device=device)
