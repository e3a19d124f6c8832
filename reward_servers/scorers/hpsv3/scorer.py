"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): a Qwen2-VL over image and prompt, with a head on its reward token.

Recipe (github.com/MizzenAI/HPSv3, PyPI hpsv3 1.0.0): the image is resized to about 448 x 448 pixels, with sides that
are multiples of 28. The prompt is placed in a fixed instruction that ends in the special token <|Reward|>. The last
hidden state at that token goes through 3 linear layers to (mu, sigma) of the preference; score = mu. A model directory
holds

    config.json, tokenizer.json, tokenizer_config.json    of Qwen/Qwen2-VL-7B-Instruct
    HPSv3.safetensors                                     of MizzenAI/HPSv3
    prompt.json                                           see `prompt.py`

Positions count every token once, including image tokens: the published code calls the language model without the
image's grid, and transformers 4.45, which it pins, then uses the positions of plain text. Unless another precision
is chosen, the body runs in the dtype of config.json (published: bfloat16). The head runs in float32.

Not verified here, because the weights (8.3 G parameters) are not available: a published score. With tiny random weights
of the same class, scores equal those of the published class run on transformers 4.45.2 (see the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.torch_device import require_device
from common.types import Precision
from common.wire import fingerprint
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.hpsv3.prompt import PLACEHOLDER, REWARD_TOKEN, HpsV3Prompt, read_prompt
from reward_servers.scorers.model_directory import (
    State,
    hash_weights,
    load_state,
    read_weights,
    require_complete,
    require_directory,
    require_unquantised,
    shorten,
)
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD
from reward_servers.scorers.processor import require_processor

WEIGHTS_FILE = "HPSv3.safetensors"
IMAGE_PIXELS = 256 * 28 * 28
HEAD_WIDTHS = (1024, 16, 2)
TYPES = {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}
# Text that apply_chat_template of Qwen2-VL puts before and after the user's one message.
SYSTEM_TURN = "system\nYou are a helpful assistant."
TURN, TURN_END, VISION, VISION_END, IMAGE = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
MAX_PROMPT_BYTES = 8192
"""A longer prompt is refused, because it would lengthen every row of its batch.

This is far longer than any caption; a prompt never has more tokens than bytes.
"""

# Names of the body's two halves in transformers before and after 4.52. Longer prefixes come first: they contain others.
BODY_PREFIXES = {
    "model.visual.": "visual.",
    "model.language_model.": "language_model.",
    "visual.": "visual.",
    "model.": "language_model.",
}


class HpsV3Tokens:
    """Converts a prompt to token ids of the whole conversation. Special tokens in a prompt stay plain characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: HpsV3Prompt) -> None:
        tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)])
        self._tokenizer = tokenizer
        self._instruction = prompt.instruction
        self._before, self._after = prompt.request.split(REWARD_TOKEN)
        self._special: dict[str, int] = {}
        for name in (TURN, TURN_END, VISION, VISION_END, IMAGE, REWARD_TOKEN):
            number: int | None = tokenizer.get_vocab().get(name)
            if number is None:
                raise ModelError(f"the tokenizer has no token {name}: it is not that of Qwen2-VL")
            self._special[name] = number

    def __len__(self) -> int:
        return len(self._tokenizer)

    def id_of(self, special: str) -> int:
        return self._special[special]

    def plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        return ids

    def __call__(self, prompt: str, image_tokens: int) -> list[int]:
        special, plain = self._special, self.plain
        return [
            *(special[TURN], *plain(SYSTEM_TURN), special[TURN_END], *plain("\n")),
            *(special[TURN], *plain("user\n"), special[VISION], *[special[IMAGE]] * image_tokens, special[VISION_END]),
            *plain(self._instruction.replace(PLACEHOLDER, prompt) + self._before),
            *(special[REWARD_TOKEN], *plain(self._after), special[TURN_END], *plain("\n")),
            *(special[TURN], *plain("assistant\n")),
        ]


class HpsV3Scorer(Scorer):
    """score = mu, the mean of the preference; unbounded."""

    name = "hpsv3"
    score_range = (-math.inf, math.inf)
    preprocess_version = "hpsv3-1"
    precisions = tuple(Precision)

    def __init__(self, model: Qwen2VLModel, head: nn.Sequential, tokens: HpsV3Tokens, prompt: HpsV3Prompt) -> None:
        self.weights_hash = fingerprint({"weights": hash_weights(model, head), "prompt": repr(prompt)})
        self._model = model.eval().requires_grad_(False)
        self.precision = Precision(str(model.dtype).removeprefix("torch."))
        self._head = head.eval().requires_grad_(False)
        self._tokens = tokens
        self._images = Qwen2VLImageProcessorPil(size={"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS})

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        require_device(device)
        require_processor(directory, {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD})
        prompt = read_prompt(directory)
        tokens = HpsV3Tokens(_load_tokenizer(directory), prompt)
        weights = directory / WEIGHTS_FILE
        state, head_state = split_state(read_weights(weights), weights)
        config = _load_config(directory, tokens, state)
        head = build_head(config.text_config.hidden_size)
        load_state(head, head_state, weights)
        model, report = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True
        )
        require_complete(report, model, weights)
        return cls(model.to(device), head.to(device), tokens, prompt)

    def use(self, precision: Precision) -> None:
        super().use(precision)
        # Not `to`: it would also round the frequencies of the positions, which stay float32 in every precision.
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(TYPES[precision])

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        for prompt in prompts:
            _require_short(prompt)
        inputs = self._images(list(images_BHWC), input_data_format="channels_last", return_tensors="pt")
        merged = self._model.config.vision_config.spatial_merge_size**2
        image_tokens = int(inputs["image_grid_thw"][0].prod()) // merged
        rows = [self._tokens(prompt, image_tokens) for prompt in prompts]
        length = max(len(row) for row in rows)
        # Padded on the right with a token that no other token attends to: attention is causal.
        padding = self._tokens.id_of(TURN_END)
        ids_BL = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=self._model.device)
        with torch.no_grad():
            states_BLD = self._model(
                input_ids=ids_BL,
                position_ids=torch.arange(length, device=ids_BL.device).expand(3, *ids_BL.shape),
                pixel_values=inputs["pixel_values"].to(self._model.device),
                image_grid_thw=inputs["image_grid_thw"].to(self._model.device),
                use_cache=False,
            ).last_hidden_state
            rewards_BD = states_BLD[ids_BL == self._tokens.id_of(REWARD_TOKEN)].float()
            scores: FloatArray = self._head(rewards_BD)[:, 0].cpu().numpy()
        return scores


def _require_short(prompt: str) -> None:
    if (size := len(prompt.encode())) > MAX_PROMPT_BYTES:
        message = f"the prompt {prompt[:40]!r}... has {size} bytes, at most {MAX_PROMPT_BYTES} are read"
        raise RewardRejected(HpsV3Scorer.name, "request", message)


def build_head(width: int) -> nn.Sequential:
    """hidden state -> (mu, sigma). The published head has dropout after its first layer, in training only."""
    first, second, last = HEAD_WIDTHS
    return nn.Sequential(
        nn.Linear(width, first), nn.ReLU(), nn.Identity(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last)
    )


def split_state(state: State, source: Path) -> tuple[State, State]:
    """Split the published tensors into weights of Qwen2VLModel and of the head.

    The language model's output layer is not used.
    """
    body: State = {}
    head: State = {}
    for name, tensor in state.items():
        for prefix, place in BODY_PREFIXES.items():
            if name.startswith(prefix):
                body[place + name.removeprefix(prefix)] = tensor
                break
        else:
            if name.startswith("rm_head."):
                head[name.removeprefix("rm_head.")] = tensor
            elif not name.startswith("lm_head."):
                raise ModelError(f"{source} has a tensor {name!r}, which HPSv3 has not")
    return body, head


def _load_config(directory: Path, tokens: HpsV3Tokens, state: State) -> Qwen2VLConfig:
    """The body's config, with the vocabulary size of the weights: training cut it to the tokens that exist."""
    # Checked here, because from_pretrained uses the default model's config when the file is missing.
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory / 'config.json'} is missing: it belongs to Qwen/Qwen2-VL-7B-Instruct")
    require_unquantised(directory)
    try:
        config = Qwen2VLConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has a config.json that is not a Qwen2-VL's: {shorten(error)}") from error
    embedding = state.get("language_model.embed_tokens.weight")
    rows = 0 if embedding is None else len(embedding)
    if rows != len(tokens) or config.image_token_id != tokens.id_of(IMAGE):
        raise ModelError(
            f"{directory}: the weights embed {rows} tokens, the tokenizer has {len(tokens)} with {REWARD_TOKEN}, "
            f"its {IMAGE} is {tokens.id_of(IMAGE)} and that of the config {config.image_token_id}: they do not fit"
        )
    config.text_config.vocab_size = rows
    return config


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"{directory / 'tokenizer.json'} is missing: it belongs to Qwen/Qwen2-VL-7B-Instruct")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise ModelError(f"the tokenizer in {directory} cannot be read: {shorten(error)}") from error
