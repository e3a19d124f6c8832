"""Text encoder of the shapes world in FLUX.2's form: a small Qwen3, trained to read captions, then frozen.

FLUX.2-klein conditions its transformer on the hidden states of three layers, concatenated at every token. Here they are
trained to predict, for every thing, its attributes and its relation to the first one. A causal model can do so, because
a relation precedes its thing. The layers after those are trained as a language model of captions.
"""

from __future__ import annotations

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor
from torch.nn import ModuleList, functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from zoo.sd3.text_encoders import STEPS, ThingReader, facts_of, places_of, sample_caption, token_ids, train_readers
from zoo.world.scenes import parse_caption
from zoo.world.tokenizers import MAX_PHRASES, THINGS, qwen_tokenizer

WIDTH = 64
LAYERS = 4
OUT_LAYERS = (1, 2, 3)
"""The transformer gets the hidden states of these layers; as in FLUX.2, the last layer is not among them."""
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
    """Train; return the frozen model, its tokenizer, and the fraction of held-out facts read correctly from tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    model = new_text_encoder(tokenizer)
    reader = ThingReader(PROMPT_WIDTH)
    modules = ModuleList([model, reader])
    accuracy = train_readers(
        modules, lambda captions: _read(model, tokenizer, reader, captions), sample_caption, seed, steps
    )
    return model, tokenizer, accuracy


def _read(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, reader: ThingReader, captions: list[str]
) -> tuple[Tensor, float]:
    """Loss of the readers and of the language model, and the fraction of facts read correctly."""
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
    """Prompt features float16 [B, MAX_PHRASES, PROMPT_WIDTH], computed by the pipeline."""
    parts = []
    for start in range(0, len(captions), 256):
        features, _ = pipeline.encode_prompt(
            captions[start : start + 256], max_sequence_length=MAX_PHRASES, text_encoder_out_layers=OUT_LAYERS
        )
        parts.append(features.half())
    return torch.cat(parts)
