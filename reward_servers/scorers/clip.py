"""What the CLIP-based scorers share: tokens, pixels, and a cosine that can be differentiated.

Text and image go through `transformers.CLIPModel` in float32. Pixels are prepared with torch alone, so that d score /
d image flows back through resize and crop (FINDINGS: bit-equal to the torchvision transforms of the published recipes).

Shape suffixes: B images, U distinct prompts, L tokens, D embedding, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from common.errors import ModelError
from common.reward_api import ByteArray, FloatArray, Metadata
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer

# Mean and standard deviation of CLIP's training images (Radford et al. 2021, arXiv 2103.00020, released code).
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageRecipe:
    """Pixels in [0, 1] -> normalised model input.

    Attributes:
        size: side of the square the model sees.
        clamp: cut the overshoot of the bicubic kernel back to [0, 1], as a resize of 8-bit images does.
    """

    size: int
    clamp: bool

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pixels_BCHW = resize_and_crop(images_BCHW, self.size)
        if self.clamp:
            pixels_BCHW = pixels_BCHW.clamp(0.0, 1.0)
        mean, std = (pixels_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
        return (pixels_BCHW - mean) / std


def resize_and_crop(images_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Shorter side to `size` by antialiased bicubic, then the centre square: torchvision's Resize and CenterCrop."""
    height, width = images_BCHW.shape[-2:]
    short = min(height, width)
    # The long side is truncated, the crop offset rounded half to even: both are torchvision's rules.
    height, width = int(size * height / short), int(size * width / short)
    if (height, width) != tuple(images_BCHW.shape[-2:]):
        images_BCHW = F.interpolate(
            images_BCHW, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images_BCHW[..., top : top + size, left : left + size]


class PromptTokens:
    """Prompts -> fixed-length token rows that always end in the one true end token."""

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int, clean: Callable[[str], str]) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._clean = clean

    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int64 [U, L] and the position int64 [U] of each row's end token, whose state is the text feature.

        Special tokens spelt out in a prompt are split into plain characters: a literal end token would otherwise end
        the prompt for the model. Truncation keeps the end token.
        """
        rows = self._tokenizer(
            [self._clean(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self._context_length,
            split_special_tokens=True,
            return_tensors="pt",
        )
        # Right padding: the number of attended tokens gives the end. The causal mask hides what comes after it.
        return rows["input_ids"], rows["attention_mask"].sum(dim=1) - 1


class ClipScorer(Scorer):
    """score = scale * cosine(image, prompt)."""

    differentiable = True

    def __init__(self, model: CLIPModel, tokens: PromptTokens, recipe: ImageRecipe, scale: float, device: str) -> None:
        state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.weights_hash = fingerprint(tensor_hashes(state))
        self.score_range = (-scale, scale)
        # The patch embedding is a convolution, and cuDNN's default TF32 would move scores in the third digit.
        torch.backends.cudnn.allow_tf32 = False
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokens = tokens
        self._recipe = recipe
        self._scale = scale
        self._device = device

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        images_BCHW = torch.tensor(images_BHWC, device=self._device).permute(0, 3, 1, 2).contiguous().float() / 255
        with torch.no_grad():
            return self._scores_B(images_BCHW, prompts).cpu().numpy()

    def score_with_gradient(
        self,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],  # noqa: ARG002
    ) -> tuple[FloatArray, FloatArray]:
        pixels_BCHW = torch.tensor(images_BCHW, device=self._device, requires_grad=True)
        scores_B = self._scores_B(pixels_BCHW, prompts)
        # Images do not see each other, so the gradient of the sum holds each score's own gradient.
        (gradients_BCHW,) = torch.autograd.grad(scores_B.sum(), pixels_BCHW)
        return scores_B.detach().cpu().numpy(), gradients_BCHW.cpu().numpy()

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
            # Pooled here: CLIPTextModel takes the highest id instead of the end token when a config says end = 2.
            ends_UD = states_ULD[torch.arange(len(prompts), device=self._device), ends_U]
            texts_UD: torch.Tensor = self._model.text_projection(ends_UD)
            return texts_UD


def load_tokenizer(model_dir: Path, vocabulary_size: int) -> CLIPTokenizer:
    """Read a CLIP tokenizer; ModelError when its files are missing, broken or larger than the model's vocabulary."""
    complete = (model_dir / "tokenizer.json").is_file() or all(
        (model_dir / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    if not complete:
        raise ModelError(f"{model_dir} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, must be there")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(model_dir, local_files_only=True, padding_side="right")
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise ModelError(f"the tokenizer in {model_dir} cannot be read: {error}") from error
    if len(tokenizer) > vocabulary_size:
        raise ModelError(
            f"the tokenizer in {model_dir} has {len(tokenizer)} tokens, its model embeds {vocabulary_size}: "
            "they do not belong together"
        )
    return tokenizer


def load_state(model: CLIPModel, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Fill `model` with `state`, as float32; ModelError when names or shapes do not match one to one."""
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{source} does not fit the architecture of its config.json: {shorten(error)}") from error


def require_directory(model_dir: Path | None, scorer: str) -> Path:
    """The model directory of a scorer that cannot do without."""
    if model_dir is None:
        raise ModelError(f"the {scorer} scorer needs its model directory: pass --model DIR")
    return model_dir


def shorten(error: Exception) -> str:
    """A library's many-line message on one line."""
    return " ".join(str(error).split())[:300]
