"""The whole service, as a user starts it: real Ray, real reward servers, real weight updates, a real kill."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from learner.records.group_files import read_groups
from tests.helpers.running_service import Process, Run, Service, assert_equal_runs
from tests.helpers.waiting import wait_until


def test_a_run_leaves_everything_it_promises(finished: Run) -> None:
    directory = finished.run_dir
    summary = finished.summary()
    assert list(summary["policies"]) == ["teacher_6", "teacher_4", "cold_start", "rtdmd"]
    assert all(set(metrics) == {"hps", "bright", "diversity"} for metrics in summary["policies"].values())
    assert summary["seconds"].keys() >= {"total", "cold_start", "alignment"}
    trained = [(line[0], line[1]) for line in finished.metrics() if line[2] == "train"]
    assert trained == [*(("cold_start", i) for i in range(4)), *(("alignment", i) for i in range(8))]
    evaluated = [line[1] for line in finished.metrics() if line[2] == "evaluation"]
    assert evaluated == [0, 3, 6]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "alignment-000006",
        "alignment-000008",
        "cold_start-000002",
        "cold_start-000004",
    ]
    trained = [(iteration, "trained") for iteration in range(8) for _ in range(4)]
    assert [(iteration, outcome) for iteration, _, outcome in finished.ends()] == trained
    assert len(set(finished.ends())) == len(trained)
    samples = {path.name for path in (directory / "samples").iterdir()}
    assert samples >= {"alignment-000003.png", "alignment-000003.json", "alignment-000006.png", "gallery.json"}
    assert "alignment-000000.png" in samples
    kept = read_groups(directory, "alignment-000000")
    assert kept.policy_steps
    assert all(len(group.advantages) == len(group.trained) > 1 for group in kept.groups)
    report = (directory / "report.html").read_text()
    assert "rtdmd" in report.lower()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (directory / "config.yaml").is_file()
    assert all(line["metrics"].get("surrogate_gap", 0) < 1e-5 for line in finished.lines())


def test_a_tracker_has_the_whole_run(finished: Run) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    sent = json.loads((finished.run_dir / "logs" / "tracker_tensorboard.json").read_text())
    assert (sent["step"], sent["table"] != "") == (4 + 8, True)
    assert list((finished.run_dir / "tensorboard").iterdir())


def test_the_console_has_a_short_line_per_iteration_and_none_of_ray(finished: Run) -> None:
    lines = [line for line in finished.output.splitlines() if re.match(r"\S+  (cold_start|alignment) \d+/", line)]
    assert len(lines) == 4 + 8
    assert max(map(len, lines)) <= 160
    assert "(raylet)" not in finished.output
    assert "Started a local Ray instance" in (finished.run_dir / "logs" / "ray.log").read_text()


def test_the_exported_lora_is_one_that_diffusers_loads(finished: Run, tiny_pipeline: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {
        "hidden_states": latents,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.ones(1, 4, 32),
        "pooled_projections": torch.ones(1, 32),
        "return_dict": False,
    }
    with torch.no_grad():
        before = pipeline.transformer(**inputs)[0]
        pipeline.load_lora_weights(finished.run_dir / "lora")
        after = pipeline.transformer(**inputs)[0]
    assert (after - before).abs().max() > 1e-4


@pytest.fixture(scope="module")
def killed(finished: Run, config: Path) -> tuple[Run, list[Process]]:
    """A run whose driver was killed after a random iteration, and what it had started."""
    run = Run(config, config.parent / "killed", "--resume", "auto")
    run.wait_for_lines(random.randrange(1, len(finished.lines()) - 1))
    left = run.kill()
    assert not (run.run_dir / "summary.json").exists()
    return run, left


def test_a_killed_run_resumes_to_the_same_end(
    finished: Run, service: Service, killed: tuple[Run, list[Process]]
) -> None:
    """`--resume auto` started it, and continues it."""
    resumed = service.run(killed[0].run_dir.name, "--resume", "auto")
    resumed.finish()
    assert_equal_runs(resumed, finished)
    watched = [(run.run_dir / "watchdog.jsonl").read_text() for run in (resumed, finished)]
    assert watched[0] == watched[1]
    assert watched[0].count('"kind": "evaluation"') == 3


def test_a_second_run_into_the_same_directory_is_refused(finished: Run, config: Path) -> None:
    before = finished.lines()
    second = Run(config, finished.run_dir)
    second.finish(status=2)
    assert f"error: {finished.run_dir} holds a run already: use --resume" in second.output
    assert finished.lines() == before


def test_a_misspelt_key_is_refused(config: Path, tmp_path: Path) -> None:
    run = Run(config, tmp_path / "run", "--alignment.grup_size", "8")
    run.finish(status=2)
    assert "alignment.grup_size" in run.output
    assert not run.run_dir.exists()


def test_a_killed_run_leaves_no_process(killed: tuple[Run, list[Process]]) -> None:
    """Stands this late since two of Ray's own agents take a minute to notice; the rest is gone within seconds."""
    _, left = killed
    names = " ".join(process.command for process in left)
    assert "reward_servers" in names
    assert "raylet" in names
    wait_until(lambda: not any(process.alive for process in left), "what the killed run had started to end")
