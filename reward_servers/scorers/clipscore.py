"""CLIPScore as defined by RTDMD: the logit of CLIP ViT-L/14 (Radford et al. 2021, arXiv 2103.00020) over 100.

exp(logit_scale) is 100 in OpenAI's weights, so the score is the cosine of image and prompt, as in the published tables
of RTDMD (arXiv 2605.26108) and in its back-propagation. The float image is resized by torchvision's antialiased
*bilinear* filter.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and DiffusionNFT divide the same logit by 30. Advantages do not depend on
the divisor; back-propagation does, through the reward's weight. CLIPScore is also not the captioning metric of Hessel
et al. 2021 (arXiv 2104.08718), which is 2.5 max(cosine, 0) of ViT-B/32 with a prefix before the caption.

The model directory is a transformers CLIPModel, as `openai/clip-vit-large-patch14` is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from transformers import CLIPModel

from reward_servers.scorers.clip import ClipScorer, processor_tokens
from reward_servers.scorers.model_directory import load_pretrained, require_directory
from reward_servers.scorers.pixels import ImageRecipe
from reward_servers.scorers.processor import clip_processor, require_processor

SCORE_DIVISOR = 100.0
"""With OpenAI's weights the score is the cosine itself; good pairs have 0.25 to 0.35."""


class ClipScoreScorer(ClipScorer):
    """score = exp(logit_scale) cosine(image, prompt) / 100."""

    name = "clipscore"
    preprocess_version = "clipscore-2"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        model = load_pretrained(CLIPModel, directory)
        require_processor(directory, clip_processor(model.config.vision_config.image_size))
        recipe = ImageRecipe(model.config.vision_config.image_size, eight_bit=False, resample="bilinear")
        scale = float(model.logit_scale.detach().exp()) / SCORE_DIVISOR
        return cls(model, processor_tokens(model, directory), recipe, scale=scale, device=device)
