"""Prompt files of the text world: no word of the evaluation's file occurs in training."""

from __future__ import annotations

from pathlib import Path

from zoo.text.captions import sample_requests

TRAIN_PROMPTS = 4_000
EVALUATION_PROMPTS = 512


def write_text_prompts(directory: Path, seed: int = 100) -> None:
    """Write `text_train.txt` and `text_evaluation.txt`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", TRAIN_PROMPTS, False), ("evaluation", EVALUATION_PROMPTS, True)):
        captions = [request.caption for request in sample_requests(count, seed, held_out)]
        (directory / f"text_{name}.txt").write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    write_text_prompts(Path(__file__).parents[1] / "prompts")
