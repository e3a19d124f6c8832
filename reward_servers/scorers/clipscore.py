"""CLIPScore as text-to-image reinforcement learning uses it: 100 * cosine of CLIP ViT-L/14 (Radford et al. 2021,
arXiv 2103.00020), over 30.

The convention is that of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470, `flow_grpo/clip_scorer.py`), which DiffusionNFT
and others share: `logits_per_image / 30`, where logit_scale.exp() is 100 in OpenAI's weights; the float image is
resized by torchvision's antialiased *bilinear* filter. It is not the captioning metric of Hessel et al. 2021 (arXiv
2104.08718), which is 2.5 max(cosine, 0) of ViT-B/32 with a prefix before the caption.

The model directory is a transformers CLIPModel, as `openai/clip-vit-large-patch14` is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from transformers import CLIPModel

from reward_servers.scorers.clip import ClipScorer, processor_tokens
from reward_servers.scorers.model_directory import load_pretrained, require_directory
from reward_servers.scorers.pixels import ImageRecipe

# Cosines of good pairs are 0.25 to 0.35: over 30 they score about 1, beside PickScore over 26.
SCORE_DIVISOR = 30.0


class ClipScoreScorer(ClipScorer):
    """score = exp(logit_scale) cosine(image, prompt) / 30."""

    name = "clipscore"
    preprocess_version = "clipscore-1"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        model = load_pretrained(CLIPModel, directory)
        recipe = ImageRecipe(model.config.vision_config.image_size, eight_bit=False, resample="bilinear")
        scale = float(model.logit_scale.detach().exp()) / SCORE_DIVISOR
        return cls(model, processor_tokens(model, directory), recipe, scale=scale, device=device)
