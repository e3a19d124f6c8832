"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): logit_scale.exp() * cosine of a fine-tuned CLIP, over 26.

The model directory is a transformers CLIPModel: config.json, model.safetensors and its tokenizer. The published
processor resizes 8-bit pixels in two passes, so on a resized picture it differs from ours by its rounding and clipping
in between (about a grey level); a picture of the model's own size is treated identically.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from transformers import CLIPModel
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from reward_servers.scorers.clip import (
    ClipScorer,
    ImageRecipe,
    PromptTokens,
    load_tokenizer,
    require_directory,
    shorten,
)

# RTDMD divides by it: raw PickScores of good images are 20 to 26, which makes this reward about 0.8 to 1, on the scale
# of the others. A model trained at another temperature keeps the constant; its reward weight is the knob.
SCORE_DIVISOR = 26.0


class PickScoreScorer(ClipScorer):
    """score = exp(logit_scale) cosine(image, prompt) / 26."""

    name = "pickscore"
    preprocess_version = "pickscore-1"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        model = _load_model(directory)
        text, vision = model.config.text_config, model.config.vision_config
        tokenizer = load_tokenizer(directory, text.vocab_size)
        # CLIP's processor hands the prompt to the tokenizer as it is.
        tokens = PromptTokens(tokenizer, text.max_position_embeddings, clean=str)
        scale = float(model.logit_scale.detach().exp()) / SCORE_DIVISOR
        return cls(model, tokens, ImageRecipe(vision.image_size, clamp=True), scale=scale, device=device)


def _load_model(directory: Path) -> CLIPModel:
    transformers_logging.disable_progress_bar()
    try:
        model, report = CLIPModel.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no readable CLIPModel: {shorten(error)}") from error
    # from_pretrained fills what it does not find with random numbers and goes on.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            example = min(str(key) for key in report[kind])
            raise ModelError(f"the weights in {directory} have {kind.replace('_', ' ')}, such as {example}")
    return model
