"""The whole service, as a user starts it: real Ray, real reward servers, real weight updates, real kills."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import xxhash
from diffusers import StableDiffusion3Pipeline

from tests.helpers.running_service import PROJECT_ROOT, Process, Run, wait_until, write_config
from tests.helpers.tiny_rewards import write_hps

PROMPTS = ("red", "blue", "a dot", "two", "big", "small", "a line", "green")


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    return write_config(folder / "run.yaml", tiny_pipeline, write_hps(folder / "hps"), PROMPTS)


@pytest.fixture(scope="module")
def finished(config: Path) -> Run:
    """An uninterrupted run with one worker: what every other run must repeat."""
    run = Run(config, config.parent / "uninterrupted")
    run.finish()
    return run


def test_a_run_leaves_everything_it_promises(finished: Run) -> None:
    directory = finished.run_dir
    summary = finished.summary()
    assert list(summary["policies"]) == ["teacher_6", "teacher_4", "cold_start", "rtdmd"]
    assert all(set(metrics) == {"hps", "bright", "diversity"} for metrics in summary["policies"].values())
    assert summary["seconds"].keys() >= {"total", "cold_start", "alignment"}
    trained = [(line[0], line[1]) for line in finished.metrics() if line[2] == "train"]
    assert trained == [*(("cold_start", i) for i in range(4)), *(("alignment", i) for i in range(8))]
    evaluated = [line[1] for line in finished.metrics() if line[2] == "evaluation"]
    assert evaluated == [3, 6]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "alignment-000006",
        "alignment-000008",
        "cold_start-000002",
        "cold_start-000004",
    ]
    samples = {path.name for path in (directory / "samples").iterdir()}
    assert samples >= {"alignment-000003.png", "alignment-000006.png", "gallery.json"}
    report = (directory / "report.html").read_text()
    assert "rtdmd" in report.lower()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (directory / "config.yaml").is_file()
    assert all(line["metrics"].get("surrogate_gap", 0) < 1e-5 for line in finished.lines())


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


def assert_equal_runs(run: Run, finished: Run) -> None:
    assert run.metrics() == finished.metrics()
    assert run.summary()["policies"] == finished.summary()["policies"]


@pytest.fixture(scope="module")
def killed(finished: Run, config: Path) -> tuple[Run, list[Process]]:
    """A run whose driver was killed after a random iteration, and what it had started."""
    run = Run(config, config.parent / "killed")
    run.wait_for_lines(random.randrange(1, len(finished.lines()) - 1))
    left = run.kill()
    assert not (run.run_dir / "summary.json").exists()
    return run, left


def test_a_killed_run_resumes_to_the_same_end(finished: Run, config: Path, killed: tuple[Run, list[Process]]) -> None:
    resumed = Run(config, killed[0].run_dir, "--resume")
    resumed.finish()
    assert_equal_runs(resumed, finished)


def test_neither_number_nor_death_of_workers_changes_anything(finished: Run, config: Path) -> None:
    """Three workers; one is killed, Ray brings it back, and it is killed for good: the others take over its calls."""
    run = Run(config, config.parent / "three_workers", "--workers.count", "3", "--workers.restarts", "1")
    run.wait_for_lines(2, stage="alignment")
    workers = run.processes("ray::RolloutWorker")
    assert len(workers) == 3
    os.kill(workers[0].pid, signal.SIGKILL)

    def replacement() -> list[Process]:
        return [process for process in run.processes("ray::RolloutWorker") if process not in workers]

    wait_until(lambda: bool(replacement()), "Ray to bring the worker back")
    os.kill(replacement()[0].pid, signal.SIGKILL)
    run.finish()
    assert_equal_runs(run, finished)


def assert_nearly_equal_runs(run: Run, finished: Run) -> None:
    assert len(run.metrics()) == len(finished.metrics())
    for (*place, found), (*expected_place, expected) in zip(run.metrics(), finished.metrics(), strict=True):
        assert place == expected_place
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), place


def test_a_killed_rank_ends_the_run_by_name_and_two_ranks_train_as_one_does(finished: Run, config: Path) -> None:
    options = ("--learner.ranks", "2")
    run = Run(config, config.parent / "dead_rank", *options)
    run.wait_for_lines(3, stage="alignment")
    ranks = run.processes("ray::Learner")
    assert len(ranks) == 2
    os.kill(max(rank.pid for rank in ranks), signal.SIGKILL)
    run.finish(status=1)
    assert "continue with --resume" in run.output.rpartition("error: ")[2]
    assert "Traceback" not in run.output
    resumed = Run(config, run.run_dir, "--resume", *options, "--learner.shard_base", "true")
    resumed.finish()
    assert_nearly_equal_runs(resumed, finished)


def test_a_reward_server_that_dies_ends_the_run_by_name(config: Path) -> None:
    """Until then it ran ahead by one iteration, evaluations among the rollouts in flight."""
    options = {"--alignment.iterations": "500", "--alignment.max_staleness": "1", "--evaluation.every": "2"}
    run = Run(config, config.parent / "no_reward", *(word for pair in options.items() for word in pair))
    run.wait_for_lines(4, stage="alignment")
    assert "evaluation" in [line["kind"] for line in run.lines()]
    (server,) = run.processes("reward_servers --scorer tests.helpers.toy_scorers:BrightnessScorer")
    os.kill(server.pid, signal.SIGKILL)
    run.finish(status=1)
    assert "error: " in run.output
    assert "local reward server bright ended with exit status -9; the end of" in run.output.rpartition("error: ")[2]
    assert "Traceback" not in run.output


def test_a_killed_run_leaves_no_process(killed: tuple[Run, list[Process]]) -> None:
    """Stands this late since two of Ray's own agents take a minute to notice; the rest is gone within seconds."""
    _, left = killed
    names = " ".join(process.command for process in left)
    assert "reward_servers" in names
    assert "raylet" in names
    wait_until(lambda: not any(process.alive for process in left), "what the killed run had started to end")


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


# ── the shapes world ─────────────────────────────────────────────────────────────────────────────────────────────────

SHORT = {
    "--cold_start.iterations": "3",
    "--cold_start.student_every": "2",
    "--alignment.iterations": "2",
    "--evaluation.every": "2",
    "--evaluation.prompts": "4",
    "--evaluation.teacher_steps": "6",
    "--evaluation.final_prompts": "4",
    "--evaluation.grid_prompts": "2",
    "--learner.threads": "1",
}


SCORERS = ("checker", "detector", "hps", "pickscore")


@pytest.mark.parametrize(("name", "pipelines"), [("shapes", "pipeline"), ("shapes_flux2", "flux2")])
def test_the_shapes_world_runs_as_recorded(name: str, pipelines: str, tmp_path: Path) -> None:
    """A few steps of both stages on the shipped weights of either family, two workers, against a golden file.

    After a change of the weights or of the numbers, record it anew with RECORD_GOLDEN=1 in the environment.
    """
    options = [word for pair in SHORT.items() for word in pair]
    run = Run(PROJECT_ROOT / f"deploy/runs/{name}.yaml", tmp_path / "run", "--quick", *options)
    run.finish()
    summary = run.summary()
    assert list(summary["policies"]) == ["teacher_6", "teacher_4", "cold_start", "rtdmd"]
    zoo, golden_file = PROJECT_ROOT / "zoo/weights", PROJECT_ROOT / f"tests/data/golden_{name}_run.json"
    weights = sorted(path for part in (*SCORERS, pipelines) for path in (zoo / part).rglob("*.safetensors"))
    found = {
        "weights": {
            str(path.parent.relative_to(zoo)): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in weights
        },
        "lines": run.metrics(),
        "policies": summary["policies"],
    }
    if "RECORD_GOLDEN" in os.environ:
        golden_file.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(golden_file.read_text())
    assert golden["weights"] == found["weights"], "the shipped weights have changed: record the golden file anew"
    assert [line[:3] for line in golden["lines"]] == [list(line[:3]) for line in found["lines"]]
    for (*_, expected), (*place, metrics) in zip(golden["lines"], found["lines"], strict=True):
        assert metrics == pytest.approx(expected, rel=2e-3, abs=2e-4), place
    for policy, expected in golden["policies"].items():
        assert found["policies"][policy] == pytest.approx(expected, rel=2e-3, abs=2e-4)
