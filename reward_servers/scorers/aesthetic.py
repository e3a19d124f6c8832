"""LAION aesthetic predictor v2 (Schuhmann et al. 2022, arXiv 2210.08402): a linear head on the normalised image
embedding of CLIP ViT-L/14, released as christophschuhmann/improved-aesthetic-predictor. It ignores the prompt.

On a GPU the released script computes CLIP in float16 and the head in float32, which is the default there.

Human ratings range from 1 to 10. A model directory, written by `python -m reward_servers.convert aesthetic`, holds

    config.json, model.safetensors    CLIP's vision tower and projection (transformers CLIPVisionModelWithProjection)
    head.safetensors                  the head, with tensor names as published
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModelWithProjection

from common.types import Precision
from reward_servers.scorers.linear_head import LinearHead
from reward_servers.scorers.model_directory import load_pretrained, load_state, read_weights, require_directory
from reward_servers.scorers.pixels import ImageRecipe
from reward_servers.scorers.processor import clip_processor, require_processor
from reward_servers.scorers.torch_scorer import TorchScorer

HEAD_FILE = "head.safetensors"


class AestheticModel(nn.Module):
    """Normalised pixels [B, 3, H, W] -> ratings [B]."""

    def __init__(self, clip: CLIPVisionModelWithProjection, head: LinearHead) -> None:
        super().__init__()
        self.clip = clip
        self.head = head

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        embeddings_BD = self.clip(pixel_values=pixels_BCHW).image_embeds
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            ratings_B: torch.Tensor = self.head(F.normalize(embeddings_BD.float(), dim=-1))
        return ratings_B


class AestheticScorer(TorchScorer):
    """score = head(image embedding / its norm)."""

    name = "aesthetic"
    version = "2"
    preprocess_version = "aesthetic-1"
    gpu_precision = Precision.FLOAT16

    def __init__(self, model: AestheticModel, recipe: ImageRecipe, device: str) -> None:
        slope_D, offset = model.head.affine()
        # The head is affine and its input has length 1: no image can score outside this range.
        self.score_range = (offset - float(slope_D.norm()), offset + float(slope_D.norm()))
        super().__init__(model, device)
        self._model = model
        self._recipe = recipe

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        published = read_weights(directory / HEAD_FILE)
        clip = load_pretrained(CLIPVisionModelWithProjection, directory)
        require_processor(directory, clip_processor(clip.config.image_size))
        head = LinearHead(clip.config.projection_dim)
        load_state(head, published, directory / HEAD_FILE)
        return cls(AestheticModel(clip, head), ImageRecipe(clip.config.image_size, eight_bit=True), device)

    def _scores_B(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:  # noqa: ARG002
        ratings_B: torch.Tensor = self._model(self._recipe(images_BCHW))
        return ratings_B
