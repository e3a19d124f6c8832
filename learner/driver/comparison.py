"""Results of a run's final comparison: each policy is evaluated once and kept. A resumed run evaluates a policy again
only if something that its result depends on has changed.

    samples/policies/teacher_28.json      metrics, their dependencies, scores of all images, and the gallery's images
    samples/policies/teacher_28-00.png    the gallery's images

`summary.json` and `samples/gallery.json` are built from these files at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.whole_files import write_whole
from learner.driver.evaluation import Evaluation
from learner.records.pictures import save_png

SCORE_DIGITS = 6


class PolicyRecords:
    """Stores the evaluation of each policy, in the order of the comparison."""

    def __init__(self, run_dir: Path, gallery_prompts: int) -> None:
        self._samples = run_dir / "samples"
        self._directory = self._samples / "policies"
        self._gallery_prompts = gallery_prompts
        self._directory.mkdir(parents=True, exist_ok=True)

    def has(self, policy: str, basis: Mapping[str, Any]) -> bool:
        """Whether the policy was evaluated on this basis: everything (JSON values) that its numbers depend on.

        A record of an earlier version may lack a part of it, which then counts as equal.
        """
        try:
            found = self._read(policy)["basis"]
            return all(key in basis and basis[key] == value for key, value in found.items())
        except (OSError, ValueError, KeyError, AttributeError):
            return False  # never evaluated, or the file is damaged: a power failure may leave an empty one

    def add(self, policy: str, basis: Mapping[str, Any], evaluation: Evaluation, seconds: float) -> None:
        """Store an evaluation. Its file is written last, so a crash in between leaves the policy unevaluated."""
        gallery = []
        for place, item in enumerate(evaluation.prompts[: self._gallery_prompts]):
            image = self._image(policy, place)
            save_png(item.images_GHWC[0], self._samples / image)
            scores = {reward: float(values[0]) for reward, values in item.rewards_G.items()}
            gallery.append({"prompt": item.prompt.text, "image": image, "scores": scores})
        # For paired comparisons: prompts without some reward keep their place.
        scores_P = [
            {reward: [round(float(v), SCORE_DIGITS) for v in values] for reward, values in item.rewards_G.items()}
            for item in evaluation.prompts
        ]
        record = {
            "basis": basis,
            "metrics": evaluation.metrics,
            "seconds": seconds,
            "gallery": gallery,
            "diversity": [round(item.diversity, SCORE_DIGITS) for item in evaluation.prompts],
            "scores": scores_P,
        }
        write_whole(self._file(policy), json.dumps(record).encode())

    def first_picture(self, policy: str) -> Path:
        """The first image of the policy in the gallery."""
        return self._samples / self._image(policy, 0)

    def metrics(self, policy: str) -> dict[str, float]:
        return dict(self._read(policy)["metrics"])

    def write_gallery(self, policies: list[str]) -> None:
        """Write `gallery.json`: for each prompt, every policy's image and scores."""
        records = {policy: self._read(policy)["gallery"] for policy in policies}
        entries = []
        for place, first in enumerate(records[policies[0]]):
            shown = {
                policy: {"image": gallery[place]["image"], "scores": gallery[place]["scores"]}
                for policy, gallery in records.items()
            }
            entries.append({"prompt": first["prompt"], "policies": shown})
        write_whole(self._samples / "gallery.json", json.dumps(entries, indent=1).encode())

    @staticmethod
    def _image(policy: str, place: int) -> str:
        return f"policies/{policy}-{place:02d}.png"

    def _file(self, policy: str) -> Path:
        return self._directory / f"{policy}.json"

    def _read(self, policy: str) -> dict[str, Any]:
        record = json.loads(self._file(policy).read_text())
        return {key: record[key] for key in ("basis", "metrics", "gallery")} if isinstance(record, dict) else {}
