"""docs/backbones.md: a family of one's own, in a file outside the project, through the whole service."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers.running_service import PROJECT_ROOT, Run
from tests.helpers.toy_family import write_toy

PROMPTS = "red\nblue\na dot\ntwo\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["PYTHONPATH", "current directory"])
def test_a_family_found_on_the_users_path_is_trained_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the current directory stands another package `common` as well: no process of the run may take it for ours."""
    (tmp_path / "package").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "other" / "common").mkdir(parents=True)
    (tmp_path / "other" / "common" / "__init__.py").write_text("raise RuntimeError('another project')")
    folder = tmp_path / ("package" if place == "PYTHONPATH" else "other")
    shutil.copy(PROJECT_ROOT / "tests" / "helpers" / "toy_family.py", folder / "my_family.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"))
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    values = {
        "run": {"name": "own"},
        "backbone": {
            "family": "my_family:ToyFlow",
            "path": str(write_toy(tmp_path / "model")),
            "width": 6,
            "options": {"shift": 3.0},
            "guidance_scale": 3.0,
        },
        "lora": {"rank": 2, "alpha": 4},
        "prompts": {"train": str(tmp_path / "prompts.txt"), "evaluation": str(tmp_path / "prompts.txt")},
        "cold_start": {"iterations": 1, "batch_size": 4},
        "alignment": {"iterations": 1, "prompts_per_iteration": 2, "group_size": 4, "ema_every": 1},
        "evaluation": {"every": 1, "prompts": 2, "grid_prompts": 2, "final_prompts": 2},
        "workers": {"num_cpus": 0.1},
        "learner": {"num_cpus": 0.1, "num_gpus": 0},
        "rewards": [{"name": "bright", "scorer": "tests.helpers.toy_scorers:BrightnessScorer", "differentiable": True}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run = Run(tmp_path / "run.yaml", tmp_path / "run", working_directory=tmp_path / "other")
    run.finish()
    assert {line["stage"] for line in run.lines()} >= {"cold_start", "alignment"}
    assert (run.run_dir / "lora" / "toy_lora.safetensors").is_file()
    assert (run.run_dir / "report.html").is_file()
    probed = re.search(r"learner: (\d+) CPU threads? \(a pass by threads: 1: .*\)", run.output)
    assert probed is not None, run.output
    assert probed[0] in (run.run_dir / "logs" / "run.log").read_text()
    assert yaml.safe_load((run.run_dir / "config.yaml").read_text())["learner"]["threads"] == int(probed[1])
