"""The shapes world's text encoder in FLUX.2's form: a small Qwen3 language model, taught to read captions, then frozen.

FLUX.2-klein conditions its transformer on the hidden states of three layers, side by side at every token. Here they are
trained to tell of every thing what it is and how it relates to the first one, which a causal model can: a relation
stands before its thing. What comes after those layers is trained as what it is, a language model of captions.
"""

from __future__ import annotations

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor
from torch.nn import ModuleList, functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from zoo.text_encoders import STEPS, ThingReader, facts_of, places_of, token_ids, train_readers
from zoo.tokenizers import MAX_PHRASES, THINGS, qwen_tokenizer
from zoo.world import parse_caption

WIDTH = 64
LAYERS = 4
OUT_LAYERS = (1, 2, 3)
"""The layers whose hidden states the transformer sees. Not the last, as in FLUX.2."""
PROMPT_WIDTH = WIDTH * len(OUT_LAYERS)


def new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text_encoder(seed: int, steps: int = STEPS) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast, float]:
    """Train; returns the frozen model, its tokenizer, and the fraction of held-out facts read right from the tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    model = new_text_encoder(tokenizer)
    reader = ThingReader(PROMPT_WIDTH)
    accuracy = train_readers(
        ModuleList([model, reader]), lambda captions: _read(model, tokenizer, reader, captions), seed, steps
    )
    return model, tokenizer, accuracy


def _read(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, reader: ThingReader, captions: list[str]
) -> tuple[Tensor, float]:
    """Loss of the readers and of the language model, and the share of facts read right."""
    prompts = [tokenizer.apply_chat_template([{"content": caption}], tokenize=False) for caption in captions]
    ids = token_ids(tokenizer, prompts, MAX_PHRASES)
    output = model(ids, attention_mask=ids != tokenizer.pad_token_id, output_hidden_states=True, use_cache=False)
    tokens = torch.cat([output.hidden_states[layer] for layer in OUT_LAYERS], -1)
    facts, slots = facts_of([parse_caption(caption) for caption in captions])
    loss, right = reader(tokens, places_of(THINGS, tokenizer, ids), facts, slots)
    next_token = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
    )
    return loss + next_token, right


@torch.no_grad()
def encode_captions(pipeline: Flux2KleinPipeline, captions: list[str]) -> Tensor:
    """Prompt features float16 [B, MAX_PHRASES, PROMPT_WIDTH], as the pipeline makes them."""
    parts = []
    for start in range(0, len(captions), 256):
        features, _ = pipeline.encode_prompt(
            captions[start : start + 256], max_sequence_length=MAX_PHRASES, text_encoder_out_layers=OUT_LAYERS
        )
        parts.append(features.half())
    return torch.cat(parts)
