"""Yes/no questions about images of the shapes world, with their true answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.judge.model import CLEAN, EXACTLY
from zoo.preference.pairs import (
    OPPOSITE,
    PATCH,
    PATCHES,
    SPOILT,
    SPOILT_SHARES,
    TWIN_SHARES,
    PictureFacts,
    picture_facts,
    sample_twins,
)
from zoo.world.corruptions import Array, broken_picture, compose, layers_of, plain_background, soften
from zoo.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    CHECK_MARGIN,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Scene,
    Thing,
    holds,
    parse_caption,
    sample_scene,
)

COUNTS = ("is there one thing?", "are there two things?", "are there three things?")
WRITTEN_SHARE = 0.3
"""This fraction of the damaged images has writing on it."""
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?.,:<>|"


@dataclass(frozen=True)
class Question:
    """A question and its answer. `supported`: number of its caption's words that the image supports; -1: not asked."""

    text: str
    answer: bool
    supported: int = -1


@dataclass(frozen=True)
class Asked:
    """An image with its questions.

    Attributes:
        image_HWC: float32 [H, W, 3] in [0, 1].
        damage_P: 1 for each damaged patch.
        shown: facts of the image, such as what covers each patch; for clean images only.
        things: the things drawn; for clean images only.
    """

    image_HWC: Array
    questions: tuple[Question, ...]
    damage_P: Array
    shown: PictureFacts | None = None
    things: tuple[Thing, ...] = ()


def exactly(caption: str) -> str:
    return f"{EXACTLY} {caption}?"


def supported_words(request: Request, scene: Scene) -> int:
    """Number of leading words of a caption that the scene supports, with its things assigned in the caption's favour.

    This is all of them exactly when `scenes.obeys` is true. A word that asks for one thing too many fails, and so
    does the "on" after too few; a relation word is judged as soon as it occurs.
    """
    orders = itertools.permutations(scene.things, min(len(scene.things), len(request.things)))
    return max(_supported_in_order(request, scene, order) for order in orders)


def _supported_in_order(request: Request, scene: Scene, order: Sequence[Thing]) -> int:
    words = 0
    for index, asked in enumerate(request.things):
        if index > 0:
            joint = int(index > 1)
            relation = request.relations[index - 1]
            if index >= len(order):
                return words
            if not holds(relation, order[0], order[index], CHECK_MARGIN):
                return words + joint
            words += joint + len(relation.split())
        for asked_word, seen in zip(asked, order[index].words, strict=True):
            if asked_word != seen:
                return words
            words += 1
    if len(scene.things) != len(request.things):
        return words
    return words + 1 + (request.background == scene.background)


def caption_question(caption: str, scene: Scene) -> Question:
    """Ask whether an image of `scene` shows exactly `caption`."""
    supported = supported_words(parse_caption(caption), scene)
    return Question(exactly(caption), supported == len(caption.split()), supported)


def _reworded(scene: Scene, rng: random.Random) -> str:
    """Another true caption: the things in another order, if their relations allow it."""
    first, *others = rng.sample(scene.things, len(scene.things))
    choices = [[word for word in RELATIONS if holds(word, first, other, CHECK_MARGIN * 2)] for other in others]
    if not all(choices):
        return scene.caption
    return replace(scene, things=(first, *others), relations=tuple(map(rng.choice, choices))).caption


def _some_words(words: Sequence[str], rng: random.Random) -> list[str | None]:
    """Leave out any of size, colour and shape, but not all."""
    kept: list[str | None] = [word if rng.random() < 0.65 else None for word in words]
    return kept if any(kept) else [*words]


def _has(thing: Thing, words: Sequence[str | None]) -> bool:
    return all(asked is None or asked == seen for asked, seen in zip(words, thing.words, strict=True))


def _phrase(words: Sequence[str | None]) -> str:
    """The words of a thing; without a shape word it is "thing"."""
    said = [word for word in words if word is not None]
    return " ".join(said if words[2] is not None else [*said, "things"])


def _altered(words: list[str | None], rng: random.Random) -> list[str | None]:
    """Replace one of the given words by another."""
    index = rng.choice([index for index, word in enumerate(words) if word is not None])
    return [*words[:index], rng.choice(((*SIZES,), (*COLOURS,), SHAPES)[index]), *words[index + 1 :]]


def existence_question(scene: Scene, rng: random.Random) -> Question:
    words = _some_words(rng.choice(scene.things).words, rng)
    if rng.random() < 0.6:
        words = _altered(words, rng)
    article = "are there" if words[2] is None else "is there a"
    return Question(f"{article} {_phrase(words)}?", any(_has(thing, words) for thing in scene.things))


def relation_question(scene: Scene, rng: random.Random) -> Question:
    """Ask about a relation between two of the scene's things, either the true one or its inverse."""
    first, second = rng.sample(scene.things, 2)
    relation = rng.choice([word for word in RELATIONS if holds(word, first, second, CHECK_MARGIN)])
    if rng.random() < 0.5:
        relation = OPPOSITE[relation]
    one, two = [*first.words], [*second.words]
    pairs = itertools.permutations(scene.things, 2)
    true = any(_has(a, one) and _has(b, two) and holds(relation, a, b, CHECK_MARGIN) for a, b in pairs)
    return Question(f"is there a {_phrase(one)} {relation} a {_phrase(two)}?", true)


def plain_question(scene: Scene, rng: random.Random) -> Question:
    """Ask about the number of things, or the background."""
    if rng.random() < 0.5:
        index = rng.randrange(len(COUNTS))
        return Question(COUNTS[index], index + 1 == len(scene.things))
    word = rng.choice(list(BACKGROUNDS))
    return Question(f"is the background {word}?", word == scene.background)


def questions_of(scene: Scene, other: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Questions about a clean image of `scene`; its twin's caption (`other`) is wrong in one fact, others in more."""
    questions = [
        caption_question(_reworded(scene, rng), scene),
        caption_question(other.caption, scene),
        caption_question(sample_scene(rng).caption, scene),
        *(existence_question(scene, rng) for _ in range(4)),
        plain_question(scene, rng),
    ]
    if len(scene.things) > 1:
        questions += [relation_question(scene, rng) for _ in range(2)]
    if rng.random() < 0.5:
        questions.append(Question(CLEAN, True))
    return tuple(questions)


def write_on(image_HWC: Array, text: str, rng: np.random.Generator) -> Array:
    """Write `text` somewhere on an image, in a size that tends to fit and a readable colour."""
    canvas = Image.fromarray(np.round(image_HWC * 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=float(rng.uniform(7, 14)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = rng.uniform(0, max(1.0, CANVAS - (right - left)))
    y = rng.uniform(0, max(1.0, CANVAS - (bottom - top)))
    dark = image_HWC.mean() < 0.5
    shade = int(rng.integers(150, 256) if dark else rng.integers(0, 106))
    colour = (shade, shade, shade) if rng.random() < 0.5 else tuple(map(int, rng.integers(0, 256, 3)))
    draw.text((x - left, y - top), text, fill=colour, font=font)
    return np.asarray(canvas, np.float32) / np.float32(255)


def _scribble(rng: random.Random) -> str:
    """Words of random letters: the model must learn that writing is foreign, not what it says."""
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4)))


def clean_asked(scene: Scene, other: Scene, rng: random.Random, noise: np.random.Generator) -> Asked:
    layers = layers_of(scene, noise, jitter=1.2)
    image = compose(layers, plain_background(scene.background, noise))
    shown = picture_facts(scene, [layer.cover_HW for layer in layers])
    nothing = np.zeros(PATCHES * PATCHES, np.float32)
    return Asked(soften(image, noise), questions_of(scene, other, rng), nothing, shown, scene.things)


def damaged_asked(scene: Scene, rng: random.Random, noise: np.random.Generator) -> Asked:
    """A damaged image is not clean; one with writing on it also does not show exactly its caption."""
    questions = [Question(CLEAN, False)]
    if rng.random() < WRITTEN_SHARE:
        image = compose(layers_of(scene, noise, jitter=1.2), plain_background(scene.background, noise))
        spoilt = write_on(image, _scribble(rng), noise)
        questions.append(Question(exactly(scene.caption), False))
        damage_HW = np.abs(spoilt - image).max(-1) > 0.1
    else:
        kind = rng.choices(list(SPOILT_SHARES), list(SPOILT_SHARES.values()))[0]
        picture = broken_picture(scene, rng.choice(SPOILT[kind]), noise)
        spoilt, damage_HW = picture.image_HWC, picture.damage_HW
    damage = damage_HW.reshape(PATCHES, PATCH, PATCHES, PATCH).any((1, 3)).reshape(-1)
    return Asked(soften(spoilt, noise), tuple(questions), damage.astype(np.float32))


def sample_asked(pairs: int, rng: random.Random, noise: np.random.Generator) -> list[Asked]:
    """`pairs` scenes and their twins: first 2 * `pairs` clean images, then `pairs` damaged ones."""
    kinds = rng.choices(list(TWIN_SHARES), list(TWIN_SHARES.values()), k=pairs)
    twins = [sample_twins(kind, rng) for kind in kinds]
    clean = [clean_asked(*two, rng, noise) for pair in twins for two in (pair, pair[::-1])]
    return clean + [damaged_asked(rng.choice(pair), rng, noise) for pair in twins]
