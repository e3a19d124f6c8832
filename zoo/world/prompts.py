"""Prompt files of the shapes world."""

from __future__ import annotations

import random
from pathlib import Path

from zoo.world.scenes import parse_caption, sample_grid_scene

TRAIN_PROMPTS = 4_000
EVALUATION_PROMPTS = 512


def write_prompts(directory: Path, seed: int = 100) -> None:
    """Write `train.txt` and `evaluation.txt`.

    Both have equal numbers of scenes with one, two and three things. There are only 72 captions of one thing, so both
    files contain those; no longer caption of the evaluation occurs in training.
    """
    rng = random.Random(seed)
    evaluation = [sample_grid_scene(rng).caption for _ in range(EVALUATION_PROMPTS)]
    held_out = {caption for caption in evaluation if len(parse_caption(caption).things) > 1}
    train: list[str] = []
    while len(train) < TRAIN_PROMPTS:
        caption = sample_grid_scene(rng).caption
        if caption not in held_out:
            train.append(caption)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "evaluation.txt").write_text("\n".join(evaluation) + "\n")
    (directory / "train.txt").write_text("\n".join(train) + "\n")


if __name__ == "__main__":
    write_prompts(Path(__file__).parents[1] / "prompts")
