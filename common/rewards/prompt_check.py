"""Finds a prompt that a reward refuses before a run or an evaluation takes time.

A request costs a model call, so only a few prompts are sent, as control requests: one with each shape of metadata, then
those with the rarest values, because a misspelt class or colour is rare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import PromptError, RewardRejected
from common.rewards.client import RewardClient
from common.rewards.control_request import ControlRequest
from common.types import Prompt

MOST_TRIED = 16
"""At most this many prompts of a set are sent to a reward."""
QUOTED_CHARACTERS = 60
"""An error quotes this many characters of a prompt."""


def require_scorable(client: RewardClient, reward: str, path: Path, prompts: Sequence[Prompt]) -> None:
    """Send a reward a control request with each of these prompts of a file, see `varied`.

    Raises:
        PromptError: the reward refuses one; it names the file, the prompt's number from 1 and the server's reason.
        RewardError: the reward does not answer, or not as it should.
    """
    for prompt in prompts:
        try:
            client.send_control(reward, ControlRequest(prompt.text, dict(prompt.metadata)))
        except RewardRejected as error:
            raise PromptError(
                f'{path}: prompt {prompt.index + 1} ("{prompt.text[:QUOTED_CHARACTERS]}") cannot be scored: {error}; '
                f"correct it, leave it out, or do without the reward {reward}"
            ) from error


def varied(prompts: Sequence[Prompt], most: int = MOST_TRIED) -> list[Prompt]:
    """At most `most` prompts, the first among them: one of each shape of metadata, then those with rare values."""
    leaves = [frozenset(_leaves(prompt.metadata)) for prompt in prompts]
    shapes = [frozenset({frozenset((place, kind) for place, kind, _ in found)}) for found in leaves]
    chosen = [0] if prompts else []
    for traits in (shapes, leaves):
        counts = Counter(trait for found in traits for trait in found)
        rarity = [sum(1 / counts[trait] for trait in found) for found in traits]
        seen = {trait for index in chosen for trait in traits[index]}
        for index in sorted(range(len(prompts)), key=lambda index: -rarity[index]):
            if len(chosen) < most and not traits[index] <= seen:
                chosen.append(index)
                seen |= traits[index]
    return [prompts[index] for index in chosen]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, str, object]]:
    """Every scalar and empty container: the keys that lead there, its type and value. A list's items share a place.

    The type keeps 1, 1.0 and true apart.
    """
    if isinstance(value, str | int | float | bool):
        yield place, type(value).__name__, value
    elif not value:
        yield place, type(value).__name__, ""
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}")
    else:
        for item in value:
            yield from _leaves(item, f"{place}[]")
