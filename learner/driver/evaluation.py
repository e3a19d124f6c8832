"""Evaluations: images of fixed prompts and seeds under a policy, their rewards, and their diversity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
from ray.actor import ActorHandle

from common.policies import SamplingSpec
from common.types import EvaluatedPrompt, Prompt
from common.whole_files import write_whole
from learner.driver.call_queue import Call
from learner.driver.publisher import Publication
from learner.driver.worker_pool import WorkerPool
from learner.records.pictures import save_png

PROMPTS_PER_CALL = 4
"""Most prompts that a worker evaluates per call: few enough to balance the load, many enough to hide the overhead.

It samples the prompts of a call together.
"""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one policy on a set of prompts: the mean of every metric, and the data of each prompt."""

    metrics: dict[str, float]
    prompts: list[EvaluatedPrompt]


def evaluate(
    pool: WorkerPool,
    prompts: Sequence[Prompt],
    spec: SamplingSpec,
    images_per_prompt: int,
    weights: Publication | None,
    *,
    group_size: int,
) -> Evaluation:
    """Evaluate a policy on the workers, sampled as `spec` says.

    A worker has room for a rollout's group of `group_size` samples; guidance takes two samples for an image.

    Returns the metric `diversity` and one metric per reward, a mean over the prompts that it scored. Every policy gets
    the same noise. `unscored` counts the missing values, prompts times rewards, if there are any.
    """
    together = max(1, min(PROMPTS_PER_CALL, group_size // (2 * images_per_prompt)))
    parts = [prompts[start : start + together] for start in range(0, len(prompts), together)]
    keys = [("evaluation", place) for place in range(len(parts))]
    for key, part in zip(keys, parts, strict=True):
        pool.submit(Call(key, partial(_start_evaluation, part, spec, images_per_prompt, weights)))
    evaluated = [item for key in keys for item in pool.take([key]).result]
    metrics = mean_rewards([item.rewards_G for item in evaluated])
    metrics["diversity"] = float(np.mean([item.diversity for item in evaluated]))
    return Evaluation(metrics, evaluated)


def mean_rewards(rewards_G: Sequence[Mapping[str, npt.NDArray[np.float32]]]) -> dict[str, float]:
    """Mean of each reward over the prompts that have it, and the number of missing values."""
    names = dict.fromkeys(name for rewards in rewards_G for name in rewards)
    means = {
        name: float(np.concatenate([rewards[name] for rewards in rewards_G if name in rewards]).mean())
        for name in names
    }
    missing = sum(len(names) - len(rewards) for rewards in rewards_G)
    return means | ({"unscored": float(missing)} if missing else {})


def _start_evaluation(
    prompts: Sequence[Prompt],
    spec: SamplingSpec,
    images_per_prompt: int,
    weights: Publication | None,
    worker: ActorHandle,
) -> list[ray.ObjectRef]:
    return [worker.evaluate.remote(prompts, spec, images_per_prompt, *(weights or ()))]


def save_grid(evaluation: Evaluation, path: Path, num_prompts: int) -> None:
    """Save one row per prompt, with its images side by side; and beside it, as .json, their prompts and scores."""
    shown = evaluation.prompts[:num_prompts]
    rows = [np.concatenate(list(item.images_GHWC), axis=1) for item in shown]
    save_png(np.concatenate(rows, axis=0), path)
    columns, height, width, _ = shown[0].images_GHWC.shape
    prompts = [
        {"prompt": item.prompt.text, "scores": {name: values.tolist() for name, values in item.rewards_G.items()}}
        for item in shown
    ]
    captions = {"columns": columns, "height": height, "width": width, "prompts": prompts}
    write_whole(path.with_suffix(".json"), json.dumps(captions).encode())
