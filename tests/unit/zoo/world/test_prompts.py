"""Prompt files of the shapes world: full, held out, and equal to the shipped ones."""

from __future__ import annotations

from pathlib import Path

from zoo.world.prompts import EVALUATION_PROMPTS, TRAIN_PROMPTS, write_prompts
from zoo.world.scenes import parse_caption


def test_prompt_files_are_full_and_long_captions_are_held_out(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    train = (tmp_path / "train.txt").read_text().splitlines()
    evaluation = (tmp_path / "evaluation.txt").read_text().splitlines()
    assert (len(train), len(evaluation)) == (TRAIN_PROMPTS, EVALUATION_PROMPTS)
    shared = set(train) & set(evaluation)
    assert all(len(parse_caption(caption).things) == 1 for caption in shared)
    shipped = Path(__file__).resolve().parents[4] / "zoo/prompts/evaluation.txt"
    assert shipped.read_text().splitlines() == evaluation
