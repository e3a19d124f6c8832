"""The final comparison's records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.types import EvaluatedPrompt, Prompt
from learner.driver.comparison import PolicyRecords
from learner.driver.evaluation import Evaluation, save_grid


def evaluation(shade: int, prompts: int = 3, images: int = 2) -> Evaluation:
    """Image g of prompt p has the one value shade + 10 p + g."""
    evaluated = []
    for place in range(prompts):
        values = np.arange(images, dtype=np.uint8) + shade + 10 * place
        pixels = np.broadcast_to(values[:, None, None, None], (images, 4, 4, 3)).copy()
        rewards = {"gold": values.astype(np.float32)}
        evaluated.append(EvaluatedPrompt(Prompt(place, f"prompt {place}"), pixels, rewards, diversity=1.0))
    return Evaluation({"gold": float(shade), "diversity": 1.0}, evaluated)


BASIS = {"spec": "Euler, 28 steps", "prompts": 3, "seed": 0, "rewards": ["gold"]}


def test_a_policy_is_kept_and_found_again(tmp_path: Path) -> None:
    records = PolicyRecords(tmp_path, gallery_prompts=2)
    assert not records.has("teacher_28", BASIS)
    records.add("teacher_28", BASIS, evaluation(100), seconds=2.0)
    again = PolicyRecords(tmp_path, gallery_prompts=2)
    assert again.has("teacher_28", dict(BASIS))
    assert again.metrics("teacher_28") == {"gold": 100.0, "diversity": 1.0}
    assert sorted(path.name for path in (tmp_path / "samples/policies").iterdir()) == [
        "teacher_28-00.png",
        "teacher_28-01.png",
        "teacher_28.json",
    ]


def test_a_record_has_the_scores_of_every_image_for_paired_comparisons(tmp_path: Path) -> None:
    records = PolicyRecords(tmp_path, gallery_prompts=1)
    records.add("rtdmd", BASIS, evaluation(100), seconds=2.0)
    record = json.loads((tmp_path / "samples/policies/rtdmd.json").read_text())
    assert record["scores"] == [{"gold": [100.0, 101.0]}, {"gold": [110.0, 111.0]}, {"gold": [120.0, 121.0]}]
    assert record["diversity"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompts": 4}, {"rewards": ["gold", "hps"]}, {"spec": "x"}])
def test_a_policy_measured_on_another_basis_counts_as_unmeasured(tmp_path: Path, change: dict[str, object]) -> None:
    records = PolicyRecords(tmp_path, gallery_prompts=2)
    records.add("teacher_28", BASIS, evaluation(100), seconds=2.0)
    assert not records.has("teacher_28", BASIS | change)


def test_a_record_that_lacks_a_part_of_the_basis_is_kept(tmp_path: Path) -> None:
    """An earlier version wrote it. One that has more was written by a later version, about something else."""
    records = PolicyRecords(tmp_path, gallery_prompts=2)
    records.add("teacher_28", BASIS, evaluation(100), seconds=2.0)
    assert records.has("teacher_28", BASIS | {"prompts_fingerprint": "a"})
    records.add("teacher_28", BASIS | {"prompts_fingerprint": "a"}, evaluation(100), seconds=2.0)
    assert not records.has("teacher_28", BASIS | {"prompts_fingerprint": "b"})
    assert not records.has("teacher_28", BASIS)


def test_a_crash_before_the_record_leaves_the_policy_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = PolicyRecords(tmp_path, gallery_prompts=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            records.add("rtdmd", BASIS, evaluation(1), seconds=1.0)
    assert not records.has("rtdmd", BASIS)
    records.add("rtdmd", BASIS, evaluation(2), seconds=1.0)
    assert records.metrics("rtdmd")["gold"] == 2.0


@pytest.mark.parametrize("left", [b"", b"[]", b'{"basis": ', b"\xff", b'{"metrics": {}}'])
def test_a_damaged_record_leaves_the_policy_unmeasured(tmp_path: Path, left: bytes) -> None:
    """A power failure may leave an empty file."""
    records = PolicyRecords(tmp_path, gallery_prompts=1)
    records.add("rtdmd", BASIS, evaluation(1), seconds=1.0)
    (tmp_path / "samples" / "policies" / "rtdmd.json").write_bytes(left)
    assert not records.has("rtdmd", BASIS)
    records.add("rtdmd", BASIS, evaluation(2), seconds=1.0)
    assert records.has("rtdmd", BASIS)


def test_the_gallery_puts_every_policy_beside_the_others(tmp_path: Path) -> None:
    records = PolicyRecords(tmp_path, gallery_prompts=2)
    records.add("before", BASIS, evaluation(100), seconds=1.0)
    records.add("after", BASIS, evaluation(150), seconds=1.0)
    records.write_gallery(["before", "after"])
    entries = json.loads((tmp_path / "samples/gallery.json").read_text())
    assert [entry["prompt"] for entry in entries] == ["prompt 0", "prompt 1"]
    assert list(entries[1]["policies"]) == ["before", "after"]
    shown = entries[1]["policies"]["after"]
    assert shown["scores"] == {"gold": 160.0}
    assert np.asarray(Image.open(tmp_path / "samples" / shown["image"])).max() == 160


def test_a_grid_has_a_row_for_each_prompt(tmp_path: Path) -> None:
    save_grid(evaluation(100), tmp_path / "new" / "grid.png", num_prompts=2)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (8, 8, 3)
    assert grid[::4, ::4, 0].tolist() == [[100, 101], [110, 111]]
