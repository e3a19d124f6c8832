"""Writes the files of a run without training: metrics, final table, gallery, kept groups, log, configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.kept_groups import GroupPicture, TrainedSamples
from common.types import Position, Stage
from learner.preflight.command_line import parse
from learner.preflight.run_file import dump_config
from learner.records.group_files import write_groups
from learner.records.pictures import save_png
from rollout_workers.group_picture import group_picture

STARTED = 1_800_000_000.0
"""When the run started, in seconds since 1970: 2027-01-15 08:00:00 UTC."""
POLICIES = {"teacher_28": 0.8, "teacher_4": 0.4, "cold_start": 0.5, "rtdmd": 0.7}
"""Mean gold of each policy."""
PROMPTS = ("big red circle on white", "<script>alert(1)</script> & co")
GROUP = 4


def record(stage: str, iteration: int, kind: str = "train", time: float | None = None, **metrics: float) -> str:
    """One line of metrics.jsonl."""
    seconds = {"evaluation": 2.0} if kind == "evaluation" else {"step": 1.0, "wait_rollouts": 0.5}
    line = {"stage": stage, "iteration": iteration, "kind": kind, "metrics": metrics, "seconds": seconds}
    return json.dumps(line | ({} if time is None else {"time": time}))


def write_run(directory: Path, iterations: int = 20, *, finished: bool = True, gain: float = 0.0) -> Path:
    """A run of `iterations` in both stages; `gain` is added to the student's scores."""
    (directory / "samples").mkdir(parents=True)
    lines = [record("cold_start", i, time=STARTED + i, fake_score_loss=1 / (1 + i)) for i in range(iterations)]
    for i in range(iterations):
        reward = 0.5 + 0.2 * i / iterations + 0.02 * math.sin(i) + gain
        metrics = {"reward/hps": reward, "student_gradient_norm": 0.3, "dropped_groups": float(i == 7)}
        lines.append(record("alignment", i, time=STARTED + iterations + i, **metrics))
        if i % 5 == 4:
            at = STARTED + iterations + i + 0.5
            lines.append(record("alignment", i + 1, "evaluation", at, gold=reward, diversity=0.4))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "config.yaml").write_text(_config(iterations), encoding="utf-8")
    write_log(directory, iterations)
    for iteration in (0, 10):
        write_group(directory, iteration)
    write_grid(directory / "samples" / f"alignment-{iterations:06d}.png")
    for name, gold in POLICIES.items():
        _write_policy(directory, name, gold + (gain if name == "rtdmd" else 0.0))
    if finished:
        _finish(directory)
    return directory


def write_log(directory: Path, iterations: int) -> None:
    """A worker restart, an alarm, and a line of another library."""
    from datetime import datetime

    times = [datetime.fromtimestamp(STARTED + iterations + second) for second in (3, 4, 5)]
    texts = [
        "rtdmd WARNING worker host:12 is gone: killed; its 2 calls go to others, and another one starts",
        "rtdmd WARNING alarm: gold fell by 0.06 while hps rose",
        "ray INFO Started a local Ray instance.",
    ]
    (directory / "logs").mkdir(exist_ok=True)
    log = "".join(f"{time:%Y-%m-%d %H:%M:%S},123 {text}\n" for time, text in zip(times, texts, strict=True))
    (directory / "logs" / "run.log").write_text(log, encoding="utf-8")


def images(seed: int, count: int = GROUP, side: int = 16) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def picture(prompt: str, seed: int) -> GroupPicture:
    scores = np.linspace(0.1, 0.4, GROUP, dtype=np.float32)
    return group_picture(prompt, images(seed), {"hps": scores, "gold": np.float32([0, 1, 0, 1])})


def write_group(directory: Path, iteration: int) -> None:
    """Two groups of three steps, of which the first and the last were trained, and not the last sample."""
    advantages = np.float32([[-1.5, -0.5, 0.5, 1.5]] * 2)
    kept = np.array([[True, True, True, False]] * 2)
    trained = TrainedSamples((1.0, 0.75, 0.5, 0.0), advantages, kept, (0,), True)
    pictures = {place: picture(prompt, place) for place, prompt in enumerate(PROMPTS)}
    write_groups(directory, Position(Stage.ALIGNMENT, iteration), pictures, trained)


def write_grid(path: Path) -> None:
    """The pictures of an evaluation: a row per prompt, two columns."""
    save_png(np.concatenate([np.concatenate(list(images(row, 2)), axis=1) for row in range(len(PROMPTS))]), path)
    prompts = [{"prompt": prompt, "scores": {"gold": [0.0, 1.0]}} for prompt in PROMPTS]
    captions = {"columns": 2, "width": 16, "height": 16, "prompts": prompts}
    path.with_suffix(".json").write_text(json.dumps(captions), encoding="utf-8")


def _write_policy(directory: Path, name: str, gold: float) -> None:
    samples = directory / "samples"
    gallery = []
    for place, prompt in enumerate(PROMPTS):
        image = f"policies/{name}-{place:02d}.png"
        (samples / image).parent.mkdir(exist_ok=True)
        save_png(images(len(name) + place, 1)[0], samples / image)
        gallery.append({"prompt": prompt, "image": image, "scores": {"gold": 1.0}})
    means = [gold + 0.02 * math.sin(place) for place in range(12)]
    fields = {
        "basis": {"prompts_fingerprint": "abc", "images_per_prompt": 2, "seed": 0},
        "metrics": {"gold": sum(means) / len(means), "diversity": 0.4},
        "gallery": gallery,
        "scores": [{"gold": [mean - 0.01, mean + 0.01]} for mean in means],
        "diversity": [0.3 + 0.02 * ((place + len(name)) % 10) for place in range(12)],
    }
    (samples / "policies" / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")


def _finish(directory: Path) -> None:
    samples = directory / "samples"
    kept = {name: json.loads((samples / "policies" / f"{name}.json").read_text()) for name in POLICIES}
    summary = {
        "policies": {name: fields["metrics"] for name, fields in kept.items()},
        "seconds": {"total": 1234.5},
        "run": {"name": "demo", "seed": 3},
    }
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    gallery = [
        {
            "prompt": prompt,
            "policies": {
                name: {key: fields["gallery"][place][key] for key in ("image", "scores")}
                for name, fields in kept.items()
            },
        }
        for place, prompt in enumerate(PROMPTS)
    ]
    (samples / "gallery.json").write_text(json.dumps(gallery), encoding="utf-8")


def _config(iterations: int) -> str:
    options = ["--quick", "--cold_start.iterations", str(iterations), "--alignment.iterations", str(2 * iterations)]
    return dump_config(parse(options, {}).config)
