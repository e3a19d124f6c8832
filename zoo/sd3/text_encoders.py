"""Text encoders of the shapes world: two CLIP text models and a T5 encoder, trained to read captions, then frozen.

SD3 conditions its transformer on the tokens of all three and on the pooled outputs of the two CLIP models. Here each is
trained, on text alone, to predict at every token that names a thing its attributes and its relation to the first one;
the pooled CLIP outputs must predict the whole scene. `zoo/flux2/text_encoder.py` trains FLUX.2's with the same readers.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from zoo.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    parse_caption,
    sample_scene,
)
from zoo.world.tokenizers import MAX_PHRASES, MAX_TOKENS, THINGS, clip_tokenizer, t5_tokenizer

CLIP_WIDTH = 64
T5_WIDTH = 128
STEPS = 400
BATCH = 128

ABSENT = "absent"
FACTS: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "relation": (ABSENT, *RELATIONS),
}
"""Each fact of a thing maps to its possible answers; the first thing has no relation."""


@dataclass
class TextEncoders:
    """The three encoders of SD3 with their tokenizers."""

    clip_tokenizer: CLIPTokenizer
    t5_tokenizer: PreTrainedTokenizerFast
    clip_1: CLIPTextModelWithProjection
    clip_2: CLIPTextModelWithProjection
    t5: T5EncoderModel


def new_text_encoders(clip_tokens: CLIPTokenizer, t5_tokens: PreTrainedTokenizerFast) -> TextEncoders:
    """Untrained encoders; CLIP has as many positions as its tokenizer's longest text has tokens."""

    def clip() -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip_tokens),
                hidden_size=CLIP_WIDTH,
                intermediate_size=2 * CLIP_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=CLIP_WIDTH,
                max_position_embeddings=clip_tokens.model_max_length,
                bos_token_id=clip_tokens.bos_token_id,
                eos_token_id=clip_tokens.eos_token_id,
                pad_token_id=clip_tokens.pad_token_id,
            )
        )

    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokens), d_model=T5_WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    )
    return TextEncoders(clip_tokens, t5_tokens, clip(), clip(), t5)


def train_text_encoders(seed: int, steps: int = STEPS) -> tuple[TextEncoders, float]:
    """Train all three together; return them frozen, and the fraction of held-out facts read correctly from tokens."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as directory:
        clip_tokens = clip_tokenizer(Path(directory))
    encoders = new_text_encoders(clip_tokens, t5_tokenizer())
    readers = nn.ModuleList([ThingReader(2 * CLIP_WIDTH), ThingReader(T5_WIDTH), _SceneReader(2 * CLIP_WIDTH)])
    modules = nn.ModuleList([encoders.clip_1, encoders.clip_2, encoders.t5, readers])
    accuracy = train_readers(modules, lambda captions: _read(encoders, readers, captions), sample_caption, seed, steps)
    return encoders, accuracy


def sample_caption(rng: random.Random) -> str:
    return sample_scene(rng).caption


def train_readers(
    modules: nn.Module,
    read: Callable[[list[str]], tuple[Tensor, float]],
    draw: Callable[[random.Random], str],
    seed: int,
    steps: int = STEPS,
) -> float:
    """Train `modules`, then freeze them; `read` gives the loss and the fraction of correctly read facts of captions.

    Returns that fraction for other captions that `draw` gives.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    for step in range(steps):
        loss, right = read([draw(rng) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"text encoders {step} loss {loss.item():.3f} facts right {right:.3f}", flush=True)
    modules.eval().requires_grad_(False)
    held_out = random.Random(seed + 1)
    return read([draw(held_out) for _ in range(512)])[1]


class ThingReader(nn.Module):
    """Predicts the facts of a thing from the token that names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({fact: nn.Linear(width, len(answers)) for fact, answers in FACTS.items()})
        self.slot = nn.Linear(width, MAX_THINGS)

    def forward(
        self, tokens_BLd: Tensor, places: Tensor, facts: dict[str, Tensor], slots: Tensor
    ) -> tuple[Tensor, float]:
        at_things = tokens_BLd[places[:, 0], places[:, 1]]
        logits = {fact: head(at_things) for fact, head in self.heads.items()}
        loss = sum((functional.cross_entropy(logits[f], facts[f]) for f in FACTS), torch.zeros(()))
        right = sum((logits[f].argmax(-1) == facts[f]).float().mean().item() for f in FACTS) / len(FACTS)
        return loss + functional.cross_entropy(self.slot(at_things), slots), right


class _SceneReader(nn.Module):
    """Predicts every thing's facts and the background from the pooled outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.things = nn.ModuleList([ThingReader(width) for _ in range(MAX_THINGS)])
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(
        self, pooled_Bd: Tensor, places: Tensor, facts: dict[str, Tensor], slots: Tensor, grounds: Tensor
    ) -> Tensor:
        loss = functional.cross_entropy(self.background(pooled_Bd), grounds)
        for slot, reader in enumerate(self.things):
            mine = slots == slot
            if mine.any():
                rows = torch.stack([places[mine, 0], torch.zeros_like(places[mine, 1])], 1)
                kept = {fact: answers[mine] for fact, answers in facts.items()}
                loss = loss + reader(pooled_Bd[:, None], rows, kept, slots[mine])[0]
        return loss


def _read(encoders: TextEncoders, readers: nn.ModuleList, captions: list[str]) -> tuple[Tensor, float]:
    """Loss over all readers, and the fraction of facts read correctly from CLIP's and T5's tokens."""
    requests = [parse_caption(caption) for caption in captions]
    clip_ids = token_ids(encoders.clip_tokenizer, captions, MAX_TOKENS)
    t5_ids = token_ids(encoders.t5_tokenizer, captions, MAX_PHRASES)
    clip_tokens, pooled = clip_features(encoders, clip_ids)
    t5_tokens = encoders.t5(t5_ids)[0]
    facts, slots = facts_of(requests)
    grounds = torch.tensor([list(BACKGROUNDS).index(request.background) for request in requests])
    clip_places = places_of(SHAPES, encoders.clip_tokenizer, clip_ids)
    t5_places = places_of(THINGS, encoders.t5_tokenizer, t5_ids)
    clip_loss, clip_right = readers[0](clip_tokens, clip_places, facts, slots)
    t5_loss, t5_right = readers[1](t5_tokens, t5_places, facts, slots)
    return clip_loss + t5_loss + readers[2](pooled, clip_places, facts, slots, grounds), (clip_right + t5_right) / 2


def clip_features(encoders: TextEncoders, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Token features [B, L, d] and pooled ones [B, d] of both CLIP models, as SD3 uses them."""
    outputs = [model(ids_BL, output_hidden_states=True) for model in (encoders.clip_1, encoders.clip_2)]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return tokens, torch.cat([output.text_embeds for output in outputs], -1)


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> Tensor:
    """Token ids [B, length], padded."""
    ids_BL: Tensor = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    return ids_BL


def places_of(phrases: Sequence[str], tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> Tensor:
    """(row, column) of every token that names a thing, in reading order."""
    naming = [tokenizer(phrase, add_special_tokens=False).input_ids[-1] for phrase in phrases]
    return torch.isin(ids, torch.tensor(naming)).nonzero()


def facts_of(requests: list[Request]) -> tuple[dict[str, Tensor], Tensor]:
    """The true answers for every thing, in reading order, and its place in its caption."""
    rows, slots = [], []
    for request in requests:
        for slot, (words, relation) in enumerate(zip(request.things, (ABSENT, *request.relations), strict=True)):
            rows.append((*words, relation))
            slots.append(slot)
    answers = {
        fact: torch.tensor([FACTS[fact].index(row[column]) for row in rows]) for column, fact in enumerate(FACTS)
    }
    return answers, torch.tensor(slots)
