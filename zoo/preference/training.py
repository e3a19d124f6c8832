"""Trains the preference models: contrast within a batch of twins, preference pairs, and auxiliary heads on plain facts.

The auxiliary heads (what covers each patch; how many things of each type are where) train the small towers to recognise
before they learn to judge. They are dropped afterwards: the saved model is a plain CLIP model.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from reward_servers.scorers.base import Scorer
from reward_servers.scorers.hps import HpsScorer
from reward_servers.scorers.pickscore import PickScoreScorer
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD
from zoo.preference.models import HPS_SIZES, PICKSCORE_SIZES, new_model, save_hps, save_pickscore
from zoo.preference.pairs import PAIR_KINDS, TYPES, CaptionFacts, PairBatch, caption_facts, held_out_pairs, sample_batch
from zoo.world.corruptions import FOOTPRINT
from zoo.world.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, sample_scene

READING_STEPS, READING_BATCH, READING_RATE = 1000, 64, 4e-3
"""The text tower first learns to read captions, which is cheap, so it can read when images are judged."""
STEPS, PAIRS, LEARNING_RATE = 2400, 16, 2e-3
LOGIT_SCALE = 26.0
"""The scale is fixed: cosines of right and wrong images then differ by some tenths; PickScore / 26 is the cosine."""


class AuxiliaryHeads(nn.Module):
    """Linear readouts of the two towers, for training only."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(vision_width, len(SIZES) + len(COLOURS) + len(SHAPES) + 1)
        self.picture = nn.Linear(vision_width, 3 * len(TYPES) + len(BACKGROUNDS) + 1)
        self.caption = nn.Linear(text_width, 3 * len(TYPES) + len(BACKGROUNDS))


Tensors = dict[str, Tensor]


def _caption_tensors(captions: Sequence[str], facts: Sequence[CaptionFacts], tokenizer: Any) -> Tensors:
    return {
        "tokens": tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")["input_ids"],
        "present": torch.from_numpy(np.stack([fact.present_T for fact in facts])),
        "sides": torch.from_numpy(np.stack([fact.sides_T2 for fact in facts])),
        "background": torch.tensor([fact.background for fact in facts]),
    }


def _batch_tensors(batch: PairBatch, tokenizer: Any) -> Tensors:
    """A batch as tensors; images are normalised as in the scorers."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    pixels = torch.from_numpy(batch.images_BHWC).permute(0, 3, 1, 2)
    return _caption_tensors(batch.captions, batch.facts, tokenizer) | {
        "pixels": ((pixels - mean) / std).contiguous(),
        "also_right": torch.from_numpy(batch.also_right_NN),
        "patches": torch.from_numpy(np.stack([fact.patches_PK for fact in batch.shown])),
        "damage": torch.from_numpy(batch.damage_NP),
        "places": torch.from_numpy(np.stack([fact.places_T2 for fact in batch.shown])),
    }


def preference_loss(model: CLIPModel, heads: AuxiliaryHeads, data: Tensors) -> Tensors:
    """The loss terms, by name, of a batch of N scenes, N twins and N damaged images; train on their sum."""
    vision = model.vision_model(pixel_values=data["pixels"])
    text = model.text_model(input_ids=data["tokens"])
    images = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    texts = F.normalize(model.text_projection(text.pooler_output), dim=-1)
    logits = LOGIT_SCALE * texts @ images.T
    count = len(texts)
    own = torch.arange(count)
    twin = (own + count // 2) % count
    forgiven = F.pad(data["also_right"], (0, count // 2))
    masked = logits.masked_fill(forgiven, -math.inf)
    contrast = F.cross_entropy(masked, own) + F.cross_entropy(masked[:, :count].T, own)
    right, half = logits[own, own], count // 2
    spoilt = logits[own[:half], own[:half] + count]
    margins = [right - logits[own, twin], right - logits[twin, own], right[:half] - spoilt]
    pairs = F.softplus(-torch.cat(margins)).mean()
    seen = _picture_loss(heads, vision.last_hidden_state[:, 1:], vision.pooler_output, data)
    return {"contrast": contrast / 2, "pairs": pairs, **seen, **_caption_loss(heads, text.pooler_output, data)}


def _picture_loss(heads: AuxiliaryHeads, patches_BPD: Tensor, pictures_BD: Tensor, data: Tensors) -> Tensors:
    """Losses of the readings of the images; images beyond the number of captions are the damaged ones."""
    present = data["present"]
    count, types = present.shape
    locally = heads.patches(patches_BPD)
    covers = _cover_loss(locally[:count, :, :-1], data["patches"])
    damaged_PK = F.pad(data["damage"], (0, 0, count, 0))
    damage = F.binary_cross_entropy_with_logits(locally[:, :, -1], damaged_PK)
    readout = heads.picture(pictures_BD)
    spoilt = F.binary_cross_entropy_with_logits(readout[:, -1], damaged_PK.amax(1))
    seen, places, background = readout[:count, :-1].split((types, 2 * types, len(BACKGROUNDS)), 1)
    places_error = ((places.reshape(count, types, 2) - data["places"]) ** 2).sum(-1)
    types_seen = F.binary_cross_entropy_with_logits(seen, present, reduction="none").sum(1).mean()
    return {
        "patches": covers,
        "types": 0.5 * types_seen,
        "places": 2 * (places_error * present).sum() / present.sum(),
        "damage": 4 * damage,
        "spoilt": spoilt,
        "grey": 0.3 * F.cross_entropy(background, data["background"]),
    }


def _cover_loss(logits_BPK: Tensor, shares_BPK: Tensor) -> Tensor:
    """Loss of the covered fraction of each patch, and of the covering size, colour and shape."""
    widths = (len(SIZES), len(COLOURS), len(SHAPES))
    loss = F.binary_cross_entropy_with_logits(logits_BPK, shares_BPK, reduction="none").sum(2).mean()
    covered = shares_BPK.sum(2) / len(widths) > FOOTPRINT
    for logits, shares in zip(logits_BPK.split(widths, 2), shares_BPK.split(widths, 2), strict=True):
        loss = loss + F.cross_entropy(logits[covered], shares[covered].argmax(1))
    return loss


def _caption_loss(heads: AuxiliaryHeads, captions_BD: Tensor, data: Tensors) -> Tensors:
    """Losses of the readings of the captions: which things, where the caption places each, the background."""
    types = len(TYPES)
    read, sides, background = heads.caption(captions_BD).split((types, 2 * types, len(BACKGROUNDS)), 1)
    present = data["present"]
    things = F.binary_cross_entropy_with_logits(read, present, reduction="none").sum(1).mean()
    side_error = ((sides.reshape(-1, types, 2) - data["sides"]) ** 2).sum(-1)
    place = (side_error * present).sum() / present.sum()
    return {"read": 0.5 * things + place + 0.3 * F.cross_entropy(background, data["background"])}


def train(sizes: dict[str, Any], seed: int, label: str, steps: int = STEPS) -> CLIPModel:
    """Train one model; the result depends only on the arguments."""
    torch.manual_seed(seed)
    rng, noise = random.Random(f"{label} {seed}"), np.random.default_rng([seed, len(label)])
    with tempfile.TemporaryDirectory() as directory:
        model, tokenizer = new_model(sizes, Path(directory))
    model.train()
    model.logit_scale.data.fill_(math.log(LOGIT_SCALE))
    model.logit_scale.requires_grad_(False)
    heads = AuxiliaryHeads(sizes["vision"][0], sizes["text"][0])

    def reading_loss() -> Tensors:
        scenes = [sample_scene(rng) for _ in range(READING_BATCH)]
        facts = [caption_facts(scene) for scene in scenes]
        data = _caption_tensors([scene.caption for scene in scenes], facts, tokenizer)
        return _caption_loss(heads, model.text_model(input_ids=data["tokens"]).pooler_output, data)

    def judging_loss() -> Tensors:
        return preference_loss(model, heads, _batch_tensors(sample_batch(PAIRS, rng, noise), tokenizer))

    text = [*model.text_model.parameters(), *heads.caption.parameters()]
    _optimise(text, reading_loss, READING_STEPS, READING_RATE, f"{label} reading")
    everything = [parameter for parameter in (*model.parameters(), *heads.parameters()) if parameter.requires_grad]
    _optimise(everything, judging_loss, steps, LEARNING_RATE, f"{label} judging")
    return model.eval()


def _optimise(
    parameters: list[nn.Parameter], terms_of_a_batch: Callable[[], Tensors], steps: int, rate: float, label: str
) -> None:
    """AdamW with a one-cycle schedule on the sum of the terms."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        terms = terms_of_a_batch()
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{label} step {step}", {name: round(term.item(), 3) for name, term in terms.items()}, flush=True)


def measure(scorer: Scorer, seed: int, label: str, count: int = 400) -> dict[str, float]:
    """Held-out pair accuracy of each kind and overall, and the score difference between right and wrong images."""
    figures, gaps = {}, []
    for kind in PAIR_KINDS:
        captions, right, wrong = held_out_pairs(kind, count, seed + 505)
        gap = _scores(scorer, right, captions) - _scores(scorer, wrong, captions)
        figures[f"pairs_{kind}"] = float((gap > 0).mean())
        gaps.append(gap)
    figures["pairs_overall"] = float((np.concatenate(gaps) > 0).mean())
    figures["mean_gap"] = float(np.concatenate(gaps).mean())
    for name, value in figures.items():
        print(f"{label} {name} {value:.4f}", flush=True)
    return figures


def _scores(scorer: Scorer, images: np.ndarray[Any, np.dtype[np.uint8]], captions: Sequence[str]) -> Any:
    chunks = [slice(start, start + 100) for start in range(0, len(captions), 100)]
    return np.concatenate([scorer.score(images[chunk], captions[chunk], ()) for chunk in chunks])


def build_hps(out_dir: Path, seed: int = 1) -> dict[str, float]:
    """Train, save to `out_dir`, and measure the model as a reward server reads it."""
    save_hps(train(HPS_SIZES, seed, "hps"), HPS_SIZES, out_dir)
    return measure(HpsScorer.load(out_dir, "cpu"), seed, "hps")


def build_pickscore(out_dir: Path, seed: int = 2) -> dict[str, float]:
    """Train, save to `out_dir`, and measure the model as a reward server reads it."""
    save_pickscore(train(PICKSCORE_SIZES, seed, "pickscore"), out_dir)
    return measure(PickScoreScorer.load(out_dir, "cpu"), seed, "pickscore")
