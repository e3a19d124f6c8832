"""Trains the judge: first its vision tower to recognise, then its language model to judge.

An image and all questions about it are one sequence, in which questions do not attend to each other. Yes and no alone
train too slowly, so there are auxiliary losses. Linear readouts, dropped afterwards, predict what covers each patch,
which thing is in the cell of an image token and whether it is damaged, the position of that cell, and the word of a
caption at which the image fails it. Also, the words of true captions are predicted, so the language model must use the
image.

Shape suffixes: B pictures, L tokens, Q questions, P patches, K words, D width.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from zoo.judge.model import (
    CLEAN,
    EXACTLY,
    FIRST_IMAGE_TOKEN,
    GRID,
    HEAD,
    IMAGE_TOKENS,
    MERGE,
    NO,
    PATCH,
    TAIL,
    VISION_WIDTH,
    WIDTH,
    YES,
    judge_tokenizer,
    load_judge,
    merged_order,
    new_judge,
    positions_of_head,
    probability_of_yes,
    save_judge,
    see,
)
from zoo.judge.questions import Asked, Question, sample_asked
from zoo.preference.pairs import TYPES
from zoo.world.corruptions import FOOTPRINT
from zoo.world.scenes import CANVAS, COLOURS, SHAPES, SIZES, Thing

SEEING_STEPS, SEEING_PAIRS = 1200, 16
JUDGING_STEPS, JUDGING_PAIRS = 1600, 12
MATRIX_LEARNING_RATE, LEARNING_RATE = 3e-3, 2e-3
"""Learning rates of Muon and AdamW."""
WARMUP_STEPS, CONSTANT_FRACTION = 100, 0.3
REPORT_EVERY = 25
PLACED_LAYER, FOUND_LAYER, APART_LAYER = 2, 3, 4
"""After these layers an image token should encode its position, a thing's last word the thing's position, and that word
also the direction from the question's first thing. Without these auxiliary losses relations stay at chance."""
CELL = CANVAS // (GRID // MERGE)
"""Side of the area of one image token, in pixels."""
IN_EVERY_QUESTION, NO_QUESTION = -1, -2
FAILING_WORD_WEIGHT = 4.0
"""About one in eight of the judged words is the one at which a caption fails."""
BLOCKS = ("blocks.", "layers.")
Terms = dict[str, Tensor]
Judge: TypeAlias = Qwen2_5_VLForConditionalGeneration
_WIDTHS = (len(SIZES), len(COLOURS), len(SHAPES))


@dataclass(frozen=True)
class Packed:
    """A batch of images with their questions, padded to the longest.

    Attributes:
        ids_BL, positions_3BL: tokens and their positions.
        question_BL: the question of a token, or `IN_EVERY_QUESTION`.
        answer_BL: at a question's last token the token of its answer, else -100.
        supported_BL: at a caption's word, 1 while the image supports the caption, 0 where it fails; -1 elsewhere.
        next_word_BL: before each word of a true caption that word's token, else -100.
        found_BL: at the last word of a thing that the image has once, the patch of its centre, else -1.
        apart_BL: there, its direction from the question's first thing (`_direction`), if that is found too.
    """

    ids_BL: Tensor
    positions_3BL: Tensor
    question_BL: Tensor
    answer_BL: Tensor
    supported_BL: Tensor
    next_word_BL: Tensor
    found_BL: Tensor
    apart_BL: Tensor

    def mask_BLL(self) -> Tensor:
        """Attention mask: a token attends to itself and earlier tokens of its own question and of the shared part."""
        length = self.ids_BL.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = self.question_BL[:, :, None] == self.question_BL[:, None, :]
        return causal & (same | (self.question_BL == IN_EVERY_QUESTION)[:, None, :])


class Readouts(nn.Module):
    """Linear readouts, for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(VISION_WIDTH, sum(_WIDTHS) + 1)
        self.things = nn.Linear(WIDTH, 3)
        self.spoilt = nn.Linear(WIDTH, 1)
        self.places = nn.Linear(WIDTH, 2 * (GRID // MERGE))
        self.found = nn.Linear(WIDTH, 2 * GRID)
        self.supported = nn.Linear(WIDTH, 1)
        self.apart = nn.Linear(WIDTH, 2 * 3)


def pack(asked: list[Asked], tokenizer: PreTrainedTokenizerFast) -> Packed:
    """Lay out the questions of each image one after another, behind the tokens that they share."""
    rows = [_pack_one(one, tokenizer) for one in asked]
    longest = max(len(row[0]) for row in rows)
    padding = (tokenizer.pad_token_id, 0, NO_QUESTION, -100, -1, -100, -1, -1)
    ids, places, question, answer, supported, next_words, found, apart = (
        torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows])
        for part, fill in enumerate(padding)
    )
    positions_3BL = places.expand(3, -1, -1).clone()
    positions_3BL[:, :, : len(HEAD)] = positions_of_head()[:, None]
    return Packed(ids, positions_3BL, question, answer, supported, next_words, found, apart)


def _pack_one(asked: Asked, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], ...]:
    head, tail = (tokenizer.convert_tokens_to_ids(list(part)) for part in (HEAD, TAIL))
    yes, no = tokenizer.convert_tokens_to_ids([YES, NO])
    first = int(positions_of_head().max()) + 1
    ids, places = [*head], [0] * len(head)
    owner, answers, supported = [IN_EVERY_QUESTION] * len(head), [-100] * len(head), [-1] * len(head)
    next_words, found, apart = [-100] * len(head), [-1] * len(head), [-1] * len(head)
    for index, question in enumerate(asked.questions):
        words = tokenizer(question.text)["input_ids"]
        body = [*words, *tail]
        ids += body
        places += range(first, first + len(body))
        owner += [index] * len(body)
        answers += [-100] * (len(body) - 1) + [yes if question.answer else no]
        borne_out = _supported(question, len(words))
        supported += [*borne_out, *[-1] * len(tail)]
        next_words += _next_words(words, borne_out if question.answer else []) + [-100] * (len(body) - len(words))
        found_here, apart_here = _found_and_apart(question, asked.things)
        found += found_here + [-1] * len(tail)
        apart += apart_here + [-1] * len(tail)
    return ids, places, owner, answers, supported, next_words, found, apart


def _supported(question: Question, tokens: int) -> list[int]:
    """Per token of the question: a caption begins after the opening words and ends before the question mark."""
    if question.supported < 0:
        return [-1] * tokens
    opening = len(EXACTLY.split())
    words = tokens - opening - 1
    labels = [1] * question.supported + [0] * (question.supported < words)
    return [-1] * opening + labels + [-1] * (tokens - opening - len(labels))


def _next_words(words: list[int], borne_out: list[int]) -> list[int]:
    """Per token of the question: the next word, if it is one of a true caption."""
    nexts = zip(words[1:], borne_out[1:], strict=False)
    labels = [word if in_caption == 1 else -100 for word, in_caption in nexts]
    return labels + [-100] * (len(words) - len(labels))


def _found_and_apart(question: Question, things: tuple[Thing, ...]) -> tuple[list[int], list[int]]:
    """Per token of the question, one per word and one for the question mark; three words name a thing."""
    words = question.text.removesuffix("?").split()
    found: list[int] = []
    apart: list[int] = []
    first: int | None = None
    for end in range(len(words) + 1):
        name = tuple(words[max(0, end - 2) : end + 1])
        patches = [int(thing.y // PATCH) * GRID + int(thing.x // PATCH) for thing in things if thing.words == name]
        patch = patches[0] if len(patches) == 1 else -1
        found.append(patch)
        apart.append(_direction(first, patch) if first is not None and min(first, patch) >= 0 else -1)
        if first is None and name in TYPES:
            first = patch
    return found, apart


def _direction(start: int, end: int) -> int:
    """Direction of patch `end` from `start`: 0 above left, 1 above, ... 4 the same place, ... 8 below right."""
    (row, column), (to_row, to_column) = divmod(start, GRID), divmod(end, GRID)
    return 3 * (1 + (to_row > row) - (to_row < row)) + 1 + (to_column > column) - (to_column < column)


def type_embeddings(model: Judge, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """For each type of thing, the sum of its words' embeddings [types, D]."""
    ids = [tokenizer.convert_tokens_to_ids([f"\u0120{word}" for word in words]) for words in TYPES]
    embedded: Tensor = model.model.language_model.embed_tokens(torch.tensor(ids)).sum(1)
    return embedded


def seeing_losses(
    readouts: Readouts, types_KD: Tensor, image_tokens_BLD: Tensor, patches_BPD: Tensor, asked: list[Asked]
) -> Terms:
    """Losses of the vision tower's readings of the images."""
    damage_BP = merged_order(torch.from_numpy(np.stack([one.damage_P for one in asked])))
    locally = readouts.patches(patches_BPD)
    spoilt_BL = damage_BP.reshape(*image_tokens_BLD.shape[:2], MERGE * MERGE).amax(2)
    return {
        "cover": 0.5 * _cover_loss(locally[:, :, :-1], asked),
        "things": _things_loss(torch.cat([image_tokens_BLD @ types_KD.T, readouts.things(image_tokens_BLD)], 2), asked),
        "damage": 2 * F.binary_cross_entropy_with_logits(locally[:, :, -1], damage_BP),
        "spoilt": 2 * F.binary_cross_entropy_with_logits(readouts.spoilt(image_tokens_BLD)[:, :, 0], spoilt_BL),
    }


def judging_losses(model: Judge, readouts: Readouts, image_tokens_BLD: Tensor, packed: Packed) -> Terms:
    """Losses of the language model's answers and of its auxiliary predictions."""
    language = model.model.language_model
    embedded_BLD = language.embed_tokens(packed.ids_BL)
    end = FIRST_IMAGE_TOKEN + IMAGE_TOKENS
    out = language(
        inputs_embeds=torch.cat([embedded_BLD[:, :FIRST_IMAGE_TOKEN], image_tokens_BLD, embedded_BLD[:, end:]], 1),
        position_ids=packed.positions_3BL,
        attention_mask={"full_attention": packed.mask_BLL()[:, None]},
        use_cache=False,
        output_hidden_states=True,
    )
    states_BLD = out.last_hidden_state
    asked_here, next_word_here, word_here = packed.answer_BL >= 0, packed.next_word_BL >= 0, packed.supported_BL >= 0
    borne_out = readouts.supported(states_BLD[word_here])[:, 0]
    true = packed.supported_BL[word_here].float()
    return {
        "answer": F.cross_entropy(model.lm_head(states_BLD[asked_here]), packed.answer_BL[asked_here]),
        "next_word": 0.5
        * F.cross_entropy(model.lm_head(states_BLD[next_word_here]), packed.next_word_BL[next_word_here]),
        "words": F.binary_cross_entropy_with_logits(borne_out, true, weight=true + (1 - true) * FAILING_WORD_WEIGHT),
    } | _whereabouts_losses(readouts, out.hidden_states, packed)


def _whereabouts_losses(readouts: Readouts, states: tuple[Tensor, ...], packed: Packed) -> Terms:
    """Losses of the positions of image tokens and things, read from the layers' states [B, L, D]."""
    placed_BKD = states[PLACED_LAYER][:, FIRST_IMAGE_TOKEN : FIRST_IMAGE_TOKEN + IMAGE_TOKENS]
    cells = torch.arange(IMAGE_TOKENS).repeat(len(placed_BKD))
    found, apart = packed.found_BL >= 0, packed.apart_BL >= 0
    return {
        "place": 0.3 * _place_loss(readouts.places(placed_BKD.flatten(0, 1)), cells),
        "found": 0.3 * _place_loss(readouts.found(states[FOUND_LAYER][found]), packed.found_BL[found]),
        "apart": 0.3 * _place_loss(readouts.apart(states[APART_LAYER][apart]), packed.apart_BL[apart]),
    }


def _place_loss(logits_NK: Tensor, places_N: Tensor) -> Tensor:
    """Loss of places in a square grid, numbered row by row; row and column are predicted separately."""
    side = logits_NK.shape[1] // 2
    rows, columns = logits_NK.split(side, 1)
    return F.cross_entropy(rows, places_N // side) + F.cross_entropy(columns, places_N % side)


def _things_loss(logits_BLK: Tensor, asked: list[Asked]) -> Tensor:
    """Loss of the thing, if any, whose centre is in the cell of an image token, and of its place in the cell."""
    kinds, offsets = torch.full(logits_BLK.shape[:2], len(TYPES)), torch.zeros(*logits_BLK.shape[:2], 2)
    for row, one in enumerate(asked):
        for thing in one.things:
            cell = int(thing.y // CELL) * (CANVAS // CELL) + int(thing.x // CELL)
            kinds[row, cell] = TYPES.index(thing.words)
            offsets[row, cell] = torch.tensor([thing.x % CELL, thing.y % CELL]) * 2 / CELL - 1
    clean, there = torch.tensor([bool(one.things) for one in asked]), kinds < len(TYPES)
    named, places = logits_BLK.split((len(TYPES) + 1, 2), 2)
    error: Tensor = ((places - offsets)[there] ** 2).sum(1).mean()
    wrong = F.cross_entropy(named[clean].flatten(0, 1), kinds[clean].flatten(), reduction="sum") / there.sum()
    return wrong + error


def _cover_loss(logits_BPK: Tensor, asked: list[Asked]) -> Tensor:
    """Loss of the covered fraction of each patch of the clean images, which come first, and of the covering words."""
    shares = [one.shown.patches_PK for one in asked if one.shown is not None]
    shares_BPK = merged_order(torch.from_numpy(np.stack(shares)))
    logits = logits_BPK[: len(shares)]
    loss = F.binary_cross_entropy_with_logits(logits, shares_BPK, reduction="none").sum(2).mean()
    covered = shares_BPK.sum(2) / len(_WIDTHS) > FOOTPRINT
    for one, share in zip(logits.split(_WIDTHS, 2), shares_BPK.split(_WIDTHS, 2), strict=True):
        loss = loss + F.cross_entropy(one[covered], share[covered].argmax(1))
    return loss


def train(seed: int, seeing_steps: int = SEEING_STEPS, judging_steps: int = JUDGING_STEPS) -> Judge:
    """Train a judge; the result depends only on the arguments."""
    torch.manual_seed(seed)
    rng, noise = random.Random(f"judge {seed}"), np.random.default_rng([seed, 4711])
    tokenizer = judge_tokenizer()
    model, readouts = new_judge(tokenizer).train(), Readouts()

    def seeing() -> Terms:
        asked = sample_asked(SEEING_PAIRS, rng, noise)
        return seeing_losses(readouts, type_embeddings(model, tokenizer), *see(model, _images(asked)), asked)

    def judging() -> Terms:
        asked = sample_asked(JUDGING_PAIRS, rng, noise)
        with torch.no_grad():
            image_tokens, _ = see(model, _images(asked))
        return judging_losses(model, readouts, image_tokens, pack(asked, tokenizer))

    words = model.model.language_model.embed_tokens
    seeing_parts = [model.model.visual, words, readouts.patches, readouts.things, readouts.spoilt]
    _optimise(seeing_parts, seeing, seeing_steps, "seeing")
    language = [
        model.model.language_model,
        model.lm_head,
        readouts.places,
        readouts.found,
        readouts.apart,
        readouts.supported,
    ]
    _optimise(language, judging, judging_steps, "judging")
    return model.eval()


def _images(asked: list[Asked]) -> Tensor:
    return torch.from_numpy(np.stack([one.image_HWC for one in asked]))


def _optimise(parts: list[nn.Module], terms_of_a_batch: Callable[[], Terms], steps: int, label: str) -> None:
    """Minimise the sum of the terms over the weights of `parts`."""
    optimizers = _new_optimizers(parts)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, _rate_factor(steps)) for one in optimizers]
    sums: dict[str, float] = defaultdict(float)
    for step in range(1, steps + 1):
        # For attention this small, memory-efficient CPU kernels take half of the time without any benefit.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            terms = terms_of_a_batch()
        for part in parts:
            part.zero_grad()
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        nn.utils.clip_grad_norm_([weight for part in parts for weight in part.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        for name, term in terms.items():
            sums[name] += term.item() / REPORT_EVERY
        if step % REPORT_EVERY == 0:
            print(f"judge {label} {step}", {name: round(value, 3) for name, value in sums.items()}, flush=True)
            sums.clear()


def _new_optimizers(parts: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward layers, AdamW for everything else."""
    named = [entry for part in parts for entry in part.named_parameters()]
    matrices = [weight for name, weight in named if weight.ndim == 2 and name.startswith(BLOCKS)]
    others = [weight for name, weight in named if weight.ndim != 2 or not name.startswith(BLOCKS)]
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


def _rate_factor(steps: int) -> Callable[[int], float]:
    """Warm-up, then a constant rate, then linearly to zero."""

    def factor(step: int) -> float:
        if step < steps * CONSTANT_FRACTION:
            return min(1.0, (step + 1) / WARMUP_STEPS)
        return (steps - step) / (steps * (1 - CONSTANT_FRACTION))

    return factor


def kind_of(question: Question) -> str:
    """The word under which its figures are reported."""
    if question.text.startswith(EXACTLY):
        return "exactly"
    if question.text == CLEAN:
        return "clean"
    return "relation" if any(f" {word} a " in question.text for word in ("above", "below", "of")) else "plain"


def measure(model: Judge, seed: int, pairs: int = 150) -> dict[str, float]:
    """Held-out accuracy of the answers, overall and by kind of question."""
    asked = sample_asked(pairs, random.Random(f"held out {seed}"), np.random.default_rng([seed, 4712]))
    right: dict[str, list[bool]] = defaultdict(list)
    for one in asked:
        images = np.repeat(np.round(one.image_HWC * 255).astype(np.uint8)[None], len(one.questions), 0)
        answers = probability_of_yes(model, images, [question.text for question in one.questions]) > 0.5
        for question, answer in zip(one.questions, answers.tolist(), strict=True):
            right[kind_of(question)].append(answer == question.answer)
    figures = {f"accuracy_{kind}": float(np.mean(hits)) for kind, hits in sorted(right.items())}
    figures["accuracy"] = float(np.mean([hit for hits in right.values() for hit in hits]))
    for name, value in figures.items():
        print(f"judge {name} {value:.4f}", flush=True)
    return figures


def build_judge(out_dir: Path, seed: int = 6) -> dict[str, float]:
    """Train, save to `out_dir`, and measure what was saved."""
    save_judge(train(seed), out_dir)
    return measure(load_judge(out_dir), seed)
