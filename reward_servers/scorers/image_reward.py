"""ImageReward-v1.0 (Xu et al. 2023, arXiv 2304.05977; THUDM/ImageReward): BLIP encodes the prompt with cross attention
to the image, a linear head rates the state at [CLS], and the rating is standardised.

    picture -> ViT-L/16 -> states ──cross attention──┐
    prompt -> BERT tokens (at most 35, padded) -> BERT ─► state of [CLS] -> head -> (rating - mean) / std

Both encoders are transformers' own BLIP classes. A model directory, written by `python -m reward_servers.convert
image_reward`, holds

    config.json            {"image_reward_version", "context_length", "vision", "text"}: the last two as BLIP's configs
    model.safetensors      vision_model.*, text_model.*, head.*, reward_mean, reward_std
    vocab.txt or tokenizer.json     the tokenizer of bert-base-uncased

Shape suffixes: B images, U distinct prompts, L tokens, N image patches and their class token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from common.errors import ModelError
from reward_servers.scorers.base import ScorerLimits
from reward_servers.scorers.linear_head import LinearHead
from reward_servers.scorers.model_directory import (
    CONFIG_FILE,
    load_state,
    load_tokenizer,
    read_settings,
    read_weights,
    require_directory,
)
from reward_servers.scorers.pixels import ImageRecipe
from reward_servers.scorers.torch_scorer import LONGEST_PROMPT, TorchScorer

WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILES = ("vocab.txt",)
BLIP_TOKENS = 2
"""BLIP added two tokens to BERT's vocabulary, [DEC] and [ENC]. ImageReward uses neither: a tokenizer may lack them."""


class ImageRewardModel(nn.Module):
    """Normalised pixels and tokens -> standardised ratings [B]."""

    reward_mean: torch.Tensor
    reward_std: torch.Tensor

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision_model = BlipVisionModel(BlipVisionConfig(**vision))
        # `is_decoder` gives every layer its cross attention; attention over the prompt itself is bidirectional.
        text_config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True)
        self.text_model = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = LinearHead(text["hidden_size"])
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def forward(self, pixels_BCHW: torch.Tensor, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        patches_BND = self.vision_model(pixel_values=pixels_BCHW).last_hidden_state
        states_BLD = self.text_model(
            input_ids=ids_BL, attention_mask=mask_BL, encoder_hidden_states=patches_BND, is_decoder=False
        ).last_hidden_state
        ratings_B: torch.Tensor = (self.head(states_BLD[:, 0]) - self.reward_mean) / self.reward_std
        return ratings_B

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest possible rating: the head is affine, and its input is the output of a layer norm.

        A layer norm gives scale * z + shift with |z| <= sqrt(D).
        """
        norm = self.text_model.encoder.layer[-1].output.LayerNorm
        slope_D, offset = self.head.affine()
        centre = float(slope_D @ norm.bias.detach().double()) + offset
        radius = float((slope_D * norm.weight.detach().double()).norm()) * len(slope_D) ** 0.5
        mean, std = float(self.reward_mean), float(self.reward_std)
        return (centre - radius - mean) / std, (centre + radius - mean) / std


class ImageRewardScorer(TorchScorer):
    """score = (head([CLS]) - mean) / std: roughly a standard normal variable over the images of its training set."""

    name = "image_reward"
    preprocess_version = "image_reward-1"
    limits = ScorerLimits(prompt_bytes=LONGEST_PROMPT)

    def __init__(
        self, model: ImageRewardModel, tokenizer: BertTokenizer, settings: dict[str, Any], device: str
    ) -> None:
        self.score_range = model.bounds()
        self.version = str(settings["image_reward_version"])
        super().__init__(model, device)
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = int(settings["context_length"])
        self._recipe = ImageRecipe(settings["vision"]["image_size"], eight_bit=True)

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        settings = read_settings(directory / CONFIG_FILE)
        try:
            model = ImageRewardModel(settings["vision"], settings["text"])
            tokenizer = load_bert_tokenizer(directory, settings["text"]["vocab_size"])
            load_state(model, read_weights(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE)
            return cls(model, tokenizer, settings, device)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{directory / CONFIG_FILE} is not an ImageReward config: {error!r}") from error

    def _scores_B(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        ids_BL, mask_BL = (tensor.to(self._device) for tensor in self._tokens(prompts))
        ratings_B: torch.Tensor = self._model(self._recipe(images_BCHW), ids_BL, mask_BL)
        return ratings_B

    def _tokens(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask int64 [B, L]. Special tokens spelt out in a prompt stay plain characters."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows = self._tokenizer(
            list(distinct),
            padding="max_length",
            truncation=True,
            max_length=self._context_length,
            split_special_tokens=True,
            return_tensors="pt",
        )
        order = [distinct[prompt] for prompt in prompts]
        return rows["input_ids"][order], rows["attention_mask"][order]


def load_bert_tokenizer(directory: Path, vocabulary_size: int) -> BertTokenizer:
    """Read BERT's tokenizer; ModelError unless it is the one this model was trained with."""
    tokenizer = load_tokenizer(BertTokenizer, directory, VOCABULARY_FILES, vocabulary_size)
    if len(tokenizer) not in (vocabulary_size, vocabulary_size - BLIP_TOKENS):
        raise ModelError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model embeds {vocabulary_size}: "
            "ImageReward's is that of bert-base-uncased"
        )
    return tokenizer
