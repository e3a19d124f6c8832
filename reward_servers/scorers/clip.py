"""Shared parts of the CLIP-based scorers: prompts as tokens, and the cosine of an image and its prompt.

`transformers.CLIPModel` encodes text and image in float32. Pixels are prepared with torch alone (see `pixels`), so
that d score / d image flows back through resize and crop, and servers do not need torchvision.

Shape suffixes: B images, U distinct prompts, L tokens, D embedding, C H W an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from reward_servers.scorers.base import ScorerLimits
from reward_servers.scorers.model_directory import load_tokenizer
from reward_servers.scorers.pixels import ImageRecipe
from reward_servers.scorers.torch_scorer import LONGEST_PROMPT, TorchScorer

VOCABULARY_FILES = ("vocab.json", "merges.txt")


class PromptTokens:
    """Converts prompts to token rows of fixed length that always end in the true end token."""

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int, clean: Callable[[str], str]) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._clean = clean

    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int64 [U, L] and the position int64 [U] of each row's end token, whose state is the text feature.

        Special tokens spelt out in a prompt are split into plain characters: a literal end token would otherwise end
        the prompt early for the model. Truncation keeps the end token.
        """
        rows = self._tokenizer(
            [self._clean(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self._context_length,
            split_special_tokens=True,
            return_tensors="pt",
        )
        # Right padding: the number of attended tokens gives the end. The causal mask hides the padding after it.
        return rows["input_ids"], rows["attention_mask"].sum(dim=1) - 1


class ClipScorer(TorchScorer):
    """score = scale * cosine(image, prompt)."""

    limits = ScorerLimits(prompt_bytes=LONGEST_PROMPT)

    def __init__(self, model: CLIPModel, tokens: PromptTokens, recipe: ImageRecipe, scale: float, device: str) -> None:
        super().__init__(model, device)
        self.score_range = (-scale, scale)
        self._model = model
        self._tokens = tokens
        self._recipe = recipe
        self._scale = scale

    def _scores_B(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        # A group shares its prompt: encode each distinct one once.
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts_UD = self._text_features(list(distinct))
        images_BD = self._model.get_image_features(pixel_values=self._recipe(images_BCHW)).pooler_output
        texts_BD = texts_UD[[distinct[prompt] for prompt in prompts]]
        return self._scale * F.cosine_similarity(images_BD, texts_BD, dim=-1)

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        ids_UL, ends_U = (tensor.to(self._device) for tensor in self._tokens(prompts))
        with torch.no_grad():
            states_ULD = self._model.text_model(input_ids=ids_UL).last_hidden_state
            # Pooled here, because CLIPTextModel takes the highest id instead of the end token when a config says end =
            # 2.
            ends_UD = states_ULD[torch.arange(len(prompts), device=self._device), ends_U]
            texts_UD: torch.Tensor = self._model.text_projection(ends_UD)
            return texts_UD


def load_clip_tokenizer(directory: Path, vocabulary_size: int) -> CLIPTokenizer:
    """Read a CLIP tokenizer; ModelError when its files are missing, broken or larger than the model's vocabulary."""
    return load_tokenizer(CLIPTokenizer, directory, VOCABULARY_FILES, vocabulary_size)


def processor_tokens(model: CLIPModel, directory: Path) -> PromptTokens:
    """Prompts tokenized as by transformers' CLIPProcessor: passed to the tokenizer unchanged."""
    text = model.config.text_config
    return PromptTokens(load_clip_tokenizer(directory, text.vocab_size), text.max_position_embeddings, clean=str)
