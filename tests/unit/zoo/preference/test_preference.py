from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from reward_servers.scorers.base import Scorer
from reward_servers.scorers.hps import HpsScorer, from_open_clip
from reward_servers.scorers.pickscore import PickScoreScorer
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD
from zoo.preference.models import new_model, save_hps, save_pickscore, to_open_clip
from zoo.preference.pairs import (
    PAIR_KINDS,
    TWINS,
    TYPES,
    caption_facts,
    held_out_pairs,
    obeyed_by,
    picture_facts,
    sample_batch,
    sample_twins,
)
from zoo.world.scenes import Scene, Thing, coverage, parse_caption, render_scenes, sample_scenes

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights"
SIZES = {"embed_dim": 16, "vision": (24, 2, 12), "text": (16, 1, 2)}
PAIRS = 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Any]:
    torch.manual_seed(0)
    model, tokenizer = new_model(SIZES, tmp_path_factory.mktemp("tokenizer"))
    with torch.no_grad():
        for weight in model.parameters():
            # What float16 can hold, so that saving changes nothing.
            weight.copy_((weight + 0.05 * torch.randn_like(weight)).half())
    return model.eval(), tokenizer


def _cosines(model: CLIPModel, tokenizer: Any, images: np.ndarray, captions: list[str]) -> np.ndarray:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        seen, read = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens)
    return F.cosine_similarity(seen.pooler_output, read.pooler_output).numpy()


def test_the_open_clip_keys_lead_back_to_the_same_weights(tiny: tuple[CLIPModel, Any]) -> None:
    state = {name: value for name, value in tiny[0].state_dict().items() if not name.endswith("position_ids")}
    back = from_open_clip(to_open_clip(state), Path("memory"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_foreign_tensor_is_refused(tiny: tuple[CLIPModel, Any]) -> None:
    with pytest.raises(KeyError, match="adapter"):
        to_open_clip({**tiny[0].state_dict(), "adapter.weight": torch.zeros(1)})


def test_servers_score_what_was_trained(tiny: tuple[CLIPModel, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    scenes = sample_scenes(5, seed=11)
    images, captions = render_scenes(scenes, seed=12), [scene.caption for scene in scenes]
    cosines = _cosines(model, tokenizer, images, captions)
    save_hps(model, SIZES, tmp_path / "hps")
    save_pickscore(model, tmp_path / "pickscore")
    assert HpsScorer.load(tmp_path / "hps", "cpu").score(images, captions, ()) == pytest.approx(cosines, abs=1e-5)
    scale = float(model.logit_scale.detach().exp()) / 26
    served = PickScoreScorer.load(tmp_path / "pickscore", "cpu").score(images, captions, ())
    assert served == pytest.approx(scale * cosines, abs=1e-5)


@pytest.mark.parametrize("kind", TWINS)
def test_twins_are_wrong_for_each_other_and_right_for_themselves(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(20):
        scene, twin = sample_twins(kind, rng)
        request, twin_request = parse_caption(scene.caption), parse_caption(twin.caption)
        assert obeyed_by(scene, request)
        assert obeyed_by(twin, twin_request)
        assert not obeyed_by(scene, twin_request)
        assert not obeyed_by(twin, request)


def test_facts_of_a_hand_made_scene() -> None:
    red, blue = Thing("small", "red", "circle", 16.0, 32.0), Thing("big", "blue", "square", 48.0, 32.0)
    scene = Scene((red, blue), ("left of",), "black")
    facts = caption_facts(scene)
    kinds = [TYPES.index(red.words), TYPES.index(blue.words)]
    assert facts.present_T.nonzero()[0].tolist() == sorted(kinds)
    assert facts.sides_T2[kinds].tolist() == [[-1, 0], [1, 0]]
    assert facts.background == 1
    covers = [coverage("circle", 16, 32, 6.5), coverage("square", 48, 32, 11)]
    shown = picture_facts(scene, covers)
    assert shown.places_T2[kinds].tolist() == [[-0.5, 0], [0.5, 0]]
    # Columns are small, big, then colours, then shapes; shares are of patches of 64 pixels.
    assert shown.patches_PK[:, 0].sum() * 64 == pytest.approx(covers[0].sum(), rel=1e-4)
    assert shown.patches_PK[:, 1].sum() * 64 == pytest.approx(covers[1].sum(), rel=1e-4)


def test_a_batch_is_a_function_of_its_seeds() -> None:
    first, second = (sample_batch(4, random.Random(1), np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(first.images_BHWC, second.images_BHWC)
    assert first.captions == second.captions
    assert first.images_BHWC.shape == (12, 64, 64, 3)
    assert first.damage_NP.any(1).all()
    assert not first.also_right_NN.diagonal().any()


@pytest.mark.parametrize(("name", "scorer_class"), [("hps", HpsScorer), ("pickscore", PickScoreScorer)])
def test_shipped_models_prefer_the_right_picture(name: str, scorer_class: type[Scorer]) -> None:
    scorer = scorer_class.load(WEIGHTS / name, "cpu")
    hits = []
    for kind in PAIR_KINDS:
        captions, right, wrong = held_out_pairs(kind, PAIRS, seed=31)
        hits.append(scorer.score(right, captions, ()) > scorer.score(wrong, captions, ()))
    assert np.concatenate(hits).mean() > 0.87


@pytest.mark.parametrize(("name", "scorer_class"), [("hps", HpsScorer), ("pickscore", PickScoreScorer)])
def test_following_the_gradient_raises_the_score(name: str, scorer_class: type[Scorer]) -> None:
    scorer = scorer_class.load(WEIGHTS / name, "cpu")
    captions, _, wrong = held_out_pairs("colour", 8, seed=33)
    images = np.ascontiguousarray(wrong.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    scores, gradients = scorer.score_with_gradient(images, captions, ())
    assert np.isfinite(gradients).all()
    norms = np.sqrt((gradients**2).sum((1, 2, 3), keepdims=True))
    assert norms.min() > 1e-4
    better, _ = scorer.score_with_gradient(images + 0.05 * gradients / norms, captions, ())
    assert (better > scores).all()
