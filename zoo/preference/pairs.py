"""Synthetic preferences: for a caption, one right image and one that is wrong in a single known way.

A *twin* of a scene differs in one fact of its caption, so the two images and the two captions give four comparisons. A
*spoilt* image shows the right scene, damaged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.world.corruptions import Array, broken_picture, compose, layers_of, plain_background, soften
from zoo.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    GAP,
    MAX_THINGS,
    RELATIONS,
    RENDER_MARGIN,
    SHAPES,
    SIZES,
    Request,
    Scene,
    Thing,
    holds,
    obeys,
    parse_caption,
    sample_scene,
)

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
SPOILT: dict[str, tuple[str, ...]] = {
    "blur": ("blurred", "blurred image", "smeared"),
    "ghost": ("ghosted", "ghosted image", "faded"),
    "broken": ("erased", "shape_blend", "colour_blend", "overlapped", "stained"),
    "cut": ("cut",),
}
"""Each pair kind maps to its damage in `zoo.world.corruptions`."""


# --- twins: one fact changed ---------------------------------------------------------------------------------------


def _recoloured(scene: Scene, rng: random.Random) -> Scene:
    """Change one thing's colour, or exchange the colours of two things."""
    if len(scene.things) > 1 and rng.random() < 0.4:
        return _exchanged(scene, "colour", rng)
    return _reworded(scene, "colour", list(COLOURS), rng)


def _reshaped(scene: Scene, rng: random.Random) -> Scene:
    if len(scene.things) > 1 and rng.random() < 0.3:
        return _exchanged(scene, "shape", rng)
    return _reworded(scene, "shape", list(SHAPES), rng)


def _resized(scene: Scene, rng: random.Random) -> Scene:
    return _reworded(scene, "size", list(SIZES), rng)


def _reworded(scene: Scene, attribute: str, words: list[str], rng: random.Random) -> Scene:
    victim = rng.randrange(len(scene.things))
    return _with_thing(scene, victim, _with_word(scene.things[victim], attribute, rng.choice(words)))


def _exchanged(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    one, two = rng.sample(range(len(scene.things)), 2)
    index = ("size", "colour", "shape").index(attribute)
    first = _with_word(scene.things[one], attribute, scene.things[two].words[index])
    second = _with_word(scene.things[two], attribute, scene.things[one].words[index])
    return _with_thing(_with_thing(scene, one, first), two, second)


def _with_word(thing: Thing, attribute: str, word: str) -> Thing:
    change: dict[str, Any] = {attribute: word}
    return replace(thing, **change)


def _with_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def _moved(scene: Scene, rng: random.Random) -> Scene:
    """Exchange the places of two things (which inverts their relation), or move one thing elsewhere."""
    if len(scene.things) == 1:
        return scene
    other = rng.randrange(1, len(scene.things))
    first, second = scene.things[0], scene.things[other]
    swapped = _with_thing(scene, 0, replace(first, x=second.x, y=second.y))
    swapped = _with_thing(swapped, other, replace(second, x=first.x, y=first.y))
    clear = [_clear_relations(swapped.things[0], thing) for thing in swapped.things[1:]]
    if not all(clear):
        return scene
    kept = zip(scene.relations, clear, strict=True)
    # The exchanged pair has the opposite relation word, so only that word distinguishes the two captions.
    relations = [OPPOSITE[old] if OPPOSITE[old] in words else rng.choice(words) for old, words in kept]
    return replace(swapped, relations=tuple(relations))


def _clear_relations(first: Thing, other: Thing) -> list[str]:
    return [word for word in RELATIONS if holds(word, first, other, RENDER_MARGIN)]


def _recounted(scene: Scene, rng: random.Random) -> Scene:
    """Remove a thing, or add one (half of the time a second one of an existing kind)."""
    count = len(scene.things)
    if count == MAX_THINGS or (count > 1 and rng.random() < 0.5):
        gone = rng.randrange(1, count)
        relations = scene.relations[: gone - 1] + scene.relations[gone:]
        return replace(scene, things=scene.things[:gone] + scene.things[gone + 1 :], relations=relations)
    words = rng.choice(scene.things).words if rng.random() < 0.5 else _random_words(rng)
    reach = SIZES[words[0]] + 1.5
    for _ in range(20):
        thing = Thing(*words, rng.uniform(reach, CANVAS - reach), rng.uniform(reach, CANVAS - reach))
        clear = _clear_relations(scene.things[0], thing)
        if clear and not any(_touch(thing, other) for other in scene.things):
            relations = (*scene.relations, rng.choice(clear))
            return replace(scene, things=(*scene.things, thing), relations=relations)
    return scene


def _random_words(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _other_background(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, background=rng.choice([word for word in BACKGROUNDS if word != scene.background]))


TWINS: dict[str, Callable[[Scene, random.Random], Scene]] = {
    "colour": _recoloured,
    "shape": _reshaped,
    "size": _resized,
    "relation": _moved,
    "count": _recounted,
    "background": _other_background,
}
PAIR_KINDS = (*TWINS, *SPOILT)
TWIN_SHARES = {"colour": 3, "shape": 5, "size": 2, "relation": 6, "count": 2, "background": 1}
SPOILT_SHARES = {"blur": 2, "ghost": 2, "broken": 4, "cut": 3}
"""Frequency of each kind in training; the harder ones occur more often."""


def _touch(first: Thing, second: Thing) -> bool:
    distance = float(np.hypot(first.x - second.x, first.y - second.y))
    return distance < SIZES[first.size] + SIZES[second.size] + GAP


def _fits(scene: Scene) -> bool:
    """Whether every thing lies inside the image and no two touch."""
    things = scene.things
    inside = all(SIZES[t.size] + 1.5 <= min(t.x, t.y, CANVAS - t.x, CANVAS - t.y) for t in things)
    return inside and not any(_touch(a, b) for i, a in enumerate(things) for b in things[i + 1 :])


def obeyed_by(scene: Scene, request: Request) -> bool:
    """Whether a drawn scene is right for a request."""
    return obeys(request, scene.things, scene.background)


def sample_twins(kind: str, rng: random.Random) -> tuple[Scene, Scene]:
    """A scene and its twin of one of `TWINS`; neither is right for the other's caption."""
    while True:
        scene = sample_scene(rng)
        twin = TWINS[kind](scene, rng)
        if twin is scene or not _fits(twin):
            continue
        request, twin_request = parse_caption(scene.caption), parse_caption(twin.caption)
        if not obeyed_by(twin, request) and not obeyed_by(scene, twin_request):
            return scene, twin


# --- batches -------------------------------------------------------------------------------------------------------

PATCH = 8
PATCHES = CANVAS // PATCH
TYPES = [(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
_CLASSES = [*SIZES, *COLOURS, *SHAPES]


@dataclass(frozen=True)
class CaptionFacts:
    """The facts of a caption.

    Attributes:
        present_T: 1 for each (size, colour, shape) type named.
        sides_T2: the side that its relations say, -1 or 1 along their axis, else 0.
        background: word index.
    """

    present_T: Array
    sides_T2: Array
    background: int


@dataclass(frozen=True)
class PictureFacts:
    """The facts of a clean image.

    Attributes:
        patches_PK: fraction of each patch covered by things of each size, colour and shape word.
        places_T2: mean place of each type's things, in [-1, 1].
    """

    patches_PK: Array
    places_T2: Array


_DIRECTION = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


def caption_facts(scene: Scene) -> CaptionFacts:
    """Derive a caption's facts from its scene."""
    present, sides = np.zeros(len(TYPES), np.float32), np.zeros((len(TYPES), 2), np.float32)
    kinds = [TYPES.index(thing.words) for thing in scene.things]
    present[kinds] = 1
    for relation, kind in zip(scene.relations, kinds[1:], strict=True):
        sides[kinds[0]] += _DIRECTION[relation]
        sides[kind] -= _DIRECTION[relation]
    return CaptionFacts(present, np.clip(sides, -1, 1), list(BACKGROUNDS).index(scene.background))


def picture_facts(scene: Scene, covers: list[Array]) -> PictureFacts:
    """Derive an image's facts from its scene and from each thing's coverage per pixel."""
    patches = np.zeros((PATCHES * PATCHES, len(_CLASSES)), np.float32)
    counts, places = np.zeros(len(TYPES), np.float32), np.zeros((len(TYPES), 2), np.float32)
    for thing, cover in zip(scene.things, covers, strict=True):
        share = cover.reshape(PATCHES, PATCH, PATCHES, PATCH).mean((1, 3)).reshape(-1)
        patches[:, [_CLASSES.index(word) for word in thing.words]] += share[:, None]
        kind = TYPES.index(thing.words)
        counts[kind] += 1
        places[kind] += np.array([thing.x, thing.y], np.float32) * 2 / CANVAS - 1
    divisors: Array = np.maximum(counts, 1)
    return PictureFacts(patches, places / divisors[:, None])


@dataclass(frozen=True)
class PairBatch:
    """N scenes, their N twins, and the N scenes again but damaged: images [3 N, H, W, 3]; captions and facts 2 N each.

    `damage_NP` [N, patches] is 1 for each damaged patch of a damaged image.
    `also_right_NN` [2 N, 2 N] marks images (columns) that happen to be right for another scene's caption (rows).
    """

    images_BHWC: Array
    captions: list[str]
    facts: list[CaptionFacts]
    shown: list[PictureFacts]
    damage_NP: Array
    also_right_NN: npt.NDArray[np.bool_]


def sample_batch(pairs: int, rng: random.Random, noise: np.random.Generator) -> PairBatch:
    """Draw a batch of `pairs` twins with their damaged versions."""
    twin_kinds = rng.choices(list(TWIN_SHARES), list(TWIN_SHARES.values()), k=pairs)
    spoilt_kinds = rng.choices(list(SPOILT_SHARES), list(SPOILT_SHARES.values()), k=pairs)
    twins = [sample_twins(kind, rng) for kind in twin_kinds]
    scenes = [scene for scene, _ in twins] + [twin for _, twin in twins]
    images, shown, damage = [], [], []
    for scene in scenes:
        layers = layers_of(scene, noise, jitter=1.2)
        images.append(compose(layers, plain_background(scene.background, noise)))
        shown.append(picture_facts(scene, [layer.cover_HW for layer in layers]))
    for scene, kind in zip(scenes, spoilt_kinds, strict=False):
        picture = broken_picture(scene, rng.choice(SPOILT[kind]), noise)
        images.append(picture.image_HWC)
        damage.append(picture.damage_HW.reshape(PATCHES, PATCH, PATCHES, PATCH).any((1, 3)).reshape(-1))
    requests = [parse_caption(scene.caption) for scene in scenes]
    also_right = np.array([[obeyed_by(scene, request) for scene in scenes] for request in requests])
    np.fill_diagonal(also_right, False)
    softened = np.stack([soften(image, noise) for image in images])
    facts = [caption_facts(scene) for scene in scenes]
    damage_NP = np.stack(damage).astype(np.float32)
    return PairBatch(softened, [scene.caption for scene in scenes], facts, shown, damage_NP, also_right)


def held_out_pairs(kind: str, count: int, seed: int) -> tuple[list[str], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """`count` captions with a right and a wrong image each, uint8 [B, H, W, 3]; the wrong one is wrong by `kind`."""
    rng, noise = random.Random(f"{kind} {seed}"), np.random.default_rng([seed, PAIR_KINDS.index(kind)])
    captions, right, wrong = [], [], []
    for _ in range(count):
        if kind in TWINS:
            scene, twin = sample_twins(kind, rng)
            bad = _draw(twin, noise)
        else:
            scene = sample_scene(rng)
            bad = broken_picture(scene, rng.choice(SPOILT[kind]), noise).image_HWC
        captions.append(scene.caption)
        right.append(_to_bytes(soften(_draw(scene, noise), noise)))
        wrong.append(_to_bytes(soften(bad, noise)))
    return captions, np.stack(right), np.stack(wrong)


def _draw(scene: Scene, noise: np.random.Generator) -> Array:
    return compose(layers_of(scene, noise), plain_background(scene.background, noise))


def _to_bytes(image: Array) -> npt.NDArray[np.uint8]:
    return np.round(image * 255).astype(np.uint8)
