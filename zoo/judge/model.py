"""Judge: a Qwen2.5-VL of 1.3 M parameters that answers yes/no questions about images of the shapes world.

It is saved as a plain Hugging Face model directory, so a vLLM server loads it like the published judges. An image of
64 x 64 has 8 x 8 patches for the vision tower and 16 tokens for the language model.

Shape suffixes: B pictures, N patches of all pictures, L tokens, D width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from common.rewards.api import ByteArray
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD
from zoo.world.scenes import CANVAS
from zoo.world.tokenizers import WORDS

PATCH = 8
MERGE = 2
FRAMES = 2
"""Qwen-VL's patches span two video frames; an image is repeated."""
GRID = CANVAS // PATCH
IMAGE_TOKENS = (GRID // MERGE) ** 2
YES, NO = "yes", "no"
CLEAN = "is the picture clean?"
EXACTLY = "does the picture show exactly"
QUESTION_WORDS = (
    *("is", "are", "there", "does", "the", "picture", "show", "exactly", "clean", "background"),
    *("thing", "things", "a", "one", "two", "three"),
)
CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
HEAD = ("<|im_start|>", "user", "<|vision_start|>", *["<|image_pad|>"] * IMAGE_TOKENS, "<|vision_end|>")
TAIL = ("<|im_end|>", "<|im_start|>", "assistant")
FIRST_IMAGE_TOKEN = HEAD.index("<|image_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
RUBRIC = f"""\
faithfulness: {EXACTLY} {{prompt}}?
quality: {CLEAN}
"""
JUDGE_SETTINGS = f"""\
# A vLLM server for this model, on the CPU, in the environment that `make judge-env` makes.
launch:
  model: .
  arguments: [--dtype, float32, --enforce-eager, --max-num-seqs, "4", --max-model-len, "256"]
  environment: {{VLLM_CPU_KVCACHE_SPACE: "1", VLLM_CPU_OMP_THREADS_BIND: nobind}}
positive_answer: "{YES}"
negative_answer: "{NO}"
timeout_s: 180
"""
WIDTH, LAYERS, MLP, HEADS, KEY_HEADS = 128, 5, 256, 4, 2
INITIAL_SPREAD = 0.06
"""This is wider than the usual 0.02, which is meant for widths in the thousands."""
VISION_WIDTH, VISION_LAYERS, VISION_MLP, VISION_HEADS = 96, 3, 192, 3


def judge_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with one token per word of the shapes world and of the questions; other text becomes bytes."""
    vocabulary = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    words = {YES, NO, "user", "assistant", "is", "are", "does"}
    words |= {f"Ġ{word}" for word in (*WORDS, *QUESTION_WORDS)}
    # A merge list joins two pieces at a time. Long words first: see zoo.world.tokenizers.write_clip_vocabulary.
    for word in sorted(words, key=lambda word: (-len(word), word)):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
            if word[:end] not in vocabulary:
                vocabulary.append(word[:end])
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def new_judge(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The architecture with random weights."""
    token = {text: tokenizer.convert_tokens_to_ids(text) for text in CONTROL}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "tie_word_embeddings": False,
        "initializer_range": INITIAL_SPREAD,
    }
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_MLP,
        "num_heads": VISION_HEADS,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "initializer_range": INITIAL_SPREAD,
        "window_size": CANVAS,
        "fullatt_block_indexes": list(range(VISION_LAYERS)),
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def patches_of(images_BHWC: Tensor) -> Tensor:
    """Images float [B, H, W, 3] in [0, 1] -> normalised patches [N, 3 * FRAMES * PATCH * PATCH], in the order of
    Qwen-VL's image processor: the 2 x 2 patches that will be merged into one token are adjacent."""
    mean, std = images_BHWC.new_tensor(OPENAI_MEAN), images_BHWC.new_tensor(OPENAI_STD)
    side = GRID // MERGE
    pixels = ((images_BHWC - mean) / std).permute(0, 3, 1, 2)
    split = pixels.reshape(-1, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    flat = split.reshape(-1, 3, 1, PATCH, PATCH).expand(-1, -1, FRAMES, -1, -1)
    return flat.reshape(-1, 3 * FRAMES * PATCH * PATCH)


def merged_order(grid: Tensor) -> Tensor:
    """Reorder values of the patches [B, GRID * GRID, ...] from row by row to the order of `patches_of`."""
    side, tail = GRID // MERGE, grid.shape[2:]
    split = grid.reshape(len(grid), side, MERGE, side, MERGE, *tail).transpose(2, 3)
    return split.reshape(len(grid), GRID * GRID, *tail)


def see(model: Qwen2_5_VLForConditionalGeneration, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens [B, IMAGE_TOKENS, WIDTH], and the patch states [B, GRID * GRID, VISION_WIDTH] they come from."""
    count = len(images_BHWC)
    grids = torch.tensor([[1, GRID, GRID]]).expand(count, -1)
    seen = model.model.visual(patches_of(images_BHWC), grid_thw=grids)
    return seen.pooler_output.reshape(count, IMAGE_TOKENS, -1), seen.last_hidden_state.reshape(count, GRID * GRID, -1)


def positions_of_head() -> Tensor:
    """Qwen-VL's (time, row, column) of each token of `HEAD`, int64 [3, len(HEAD)]; text continues after them."""
    side = GRID // MERGE
    text = torch.arange(FIRST_IMAGE_TOKEN).expand(3, -1)
    cells = torch.tensor([(0, row, column) for row, column in itertools.product(range(side), repeat=2)]).T
    after = torch.full((3, 1), FIRST_IMAGE_TOKEN + side)
    return torch.cat([text, cells + FIRST_IMAGE_TOKEN, after], 1)


def save_judge(model: Qwen2_5_VLForConditionalGeneration, directory: Path) -> None:
    """Write float16 weights, tokenizer, settings of the image processor, rubric, and the serving settings."""
    model.half().save_pretrained(directory)
    judge_tokenizer().save_pretrained(directory)
    # Every image becomes CANVAS x CANVAS: the minimum and maximum of pixels are equal.
    image: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "size": {"shortest_edge": CANVAS**2, "longest_edge": CANVAS**2},
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    }
    video = image | {"video_processor_type": "Qwen2VLVideoProcessor"}
    del video["image_processor_type"]
    for name, settings in {
        "preprocessor_config.json": image | {"processor_class": "Qwen2_5_VLProcessor"},
        "video_preprocessor_config.json": video,
    }.items():
        (directory / name).write_text(json.dumps(settings, indent=1) + "\n")
    (directory / "judge.yaml").write_text(JUDGE_SETTINGS)
    (directory / "rubric.yaml").write_text(RUBRIC)


def load_judge(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Read a saved judge as float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def probability_of_yes(
    model: Qwen2_5_VLForConditionalGeneration, images_BHWC: ByteArray, questions: Sequence[str]
) -> Tensor:
    """P(yes) / (P(yes) + P(no)) of one question per image uint8 [B, H, W, 3]: float32 [B]."""
    tokenizer = judge_tokenizer()
    image_tokens, _ = see(model, torch.tensor(images_BHWC).float() / 255)
    head = torch.tensor(tokenizer.convert_tokens_to_ids(list(HEAD)))
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([YES, NO]))
    tail = tokenizer.convert_tokens_to_ids(list(TAIL))
    results = []
    for tokens, question in zip(image_tokens, questions, strict=True):
        ids = torch.cat([head, torch.tensor(tokenizer(question)["input_ids"] + tail)])
        embedded = model.model.language_model.embed_tokens(ids)
        embedded[FIRST_IMAGE_TOKEN : FIRST_IMAGE_TOKEN + IMAGE_TOKENS] = tokens
        start = positions_of_head()
        text = start.max() + 1 + torch.arange(len(ids) - start.shape[1]).expand(3, -1)
        states = model.model.language_model(
            inputs_embeds=embedded[None], position_ids=torch.cat([start, text], 1)[:, None], use_cache=False
        )
        logits = model.lm_head(states.last_hidden_state[0, -1])
        results.append(logits[answers].softmax(0)[0])
    return torch.stack(results)
