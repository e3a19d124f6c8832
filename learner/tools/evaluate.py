"""Score a run, or any diffusers pipeline, on a prompt set with any rewards; write a table with the published columns.

    rtdmd evaluate --run runs/NAME --prompts prompts.jsonl --out scores  # the run's own rewards
    rtdmd evaluate --pipeline DIR --call num_inference_steps=28 --prompts prompts.txt \\
        --reward pickscore=http://host:8101 --scorer ocr=ocr --out scores

    prompts ─► images of each ─► every reward ─► scores.jsonl, evaluation.md, grid.png

A missing score ends the evaluation and names the reward: a table never contains a zero in its place. Needs no Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import strict_json
from common.command import some_time, user_path
from common.config.rewards import RewardClientConfig
from common.errors import ConfigError
from common.policies import policy_spec
from common.prompts import load_prompts
from common.rewards.api import ServerInfo
from common.torch_device import require_device
from common.types import ByteArray, Prompt
from common.whole_files import whole_files
from learner.records.pictures import captioned_grid
from learner.tools.diffusers_pipeline import PipelinePictures
from learner.tools.options import add_sampling_options, at_least_one, tool_status
from learner.tools.score_table import PUBLISHED_UNITS, TAG, ScoredPrompt, markdown_table, table, tables_by_tag
from learner.tools.scoring import EvaluationRewards, choose, started
from learner.tools.trained_run import TrainedRun
from rollout_workers.sampler import sample_pictures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEARLY_JSON = ("true", "false", "null", "none")
"""Words that are values in JSON or in Python, in small letters."""
PARTIAL_SCORES = "scores.partial.jsonl"
"""The scores so far: what a failed evaluation leaves."""
OF_RUNS = ("base", "steps", "guidance")
OF_PIPELINES = ("call", "dtype")


@dataclass(frozen=True)
class Subject:
    """The evaluated model: its name in the table, its sampling in words, and its sampling function."""

    name: str
    sampling: str
    pictures: Callable[[Prompt], ByteArray]


def evaluate(arguments: argparse.Namespace) -> Path:
    """Evaluate; return the path of evaluation.md."""
    _check_options(arguments)
    require_device(arguments.device)
    prompts = load_prompts(arguments.prompts)[: arguments.limit]
    run = None if arguments.run is None else TrainedRun.open(arguments.run, arguments.base)
    choice = choose(arguments.reward, arguments.scorer, None if run is None else run.config)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with started(choice, out / "logs", arguments.timeout_s) as rewards:
        infos = rewards.introduce(arguments.prompts, prompts)
        subject = _pipeline(arguments) if run is None else _policy(run, arguments)
        shown: list[tuple[str, ByteArray]] = []
        scored = list(_scored(prompts, subject, rewards, out / PARTIAL_SCORES, shown, arguments.grid_prompts))
    counts = f"{len(prompts)} prompts of {arguments.prompts.name}, {arguments.images_per_prompt} images each"
    with whole_files(out) as folder:  # until its end `out` keeps an earlier evaluation
        captioned_grid(shown).save(folder / "grid.png")
        (folder / "evaluation.md").write_text(_document(subject, counts, scored, infos), encoding="utf-8")
        (out / PARTIAL_SCORES).replace(folder / "scores.jsonl")
    return out / "evaluation.md"


def _scored(
    prompts: Sequence[Prompt],
    subject: Subject,
    rewards: EvaluationRewards,
    lines: Path,
    shown: list[tuple[str, ByteArray]],
    most_shown: int,
) -> Iterator[ScoredPrompt]:
    """Sample and score prompt by prompt. Scores are written as they come; the first prompts' images go to `shown`."""
    with lines.open("w", encoding="utf-8") as file:
        for done, prompt in enumerate(prompts, start=1):
            images_GHWC = subject.pictures(prompt)
            scores_G = rewards.score(prompt, images_GHWC)
            as_lists = {name: values.tolist() for name, values in scores_G.items()}
            record = {"index": prompt.index, "prompt": prompt.text, "metadata": dict(prompt.metadata)}
            file.write(f"{json.dumps(record | {'scores': as_lists}, ensure_ascii=False)}\n")
            if len(shown) < most_shown:
                shown.append((prompt.text, images_GHWC))
            if done % 20 == 0 or done == len(prompts):
                print(f"{done} of {len(prompts)} prompts", file=sys.stderr, flush=True)
            tag = prompt.metadata.get(TAG)
            yield ScoredPrompt(scores_G, tag if isinstance(tag, str) else None)


def _policy(run: TrainedRun, arguments: argparse.Namespace) -> Subject:
    spec = policy_spec(run.config, arguments.policy, arguments.steps, arguments.guidance)
    seed = run.config.run.seed if arguments.seed is None else arguments.seed
    backbone = run.load(arguments.policy, arguments.device)
    empty = backbone.encode_prompts([""])

    def pictures(prompt: Prompt) -> ByteArray:
        return sample_pictures(backbone, prompt, spec, seed=seed, count=arguments.images_per_prompt, empty=empty)

    used = "" if run.checkpoint is None else f", {run.checkpoint.name}"
    sampling = f"{spec.num_steps} steps, guidance {spec.guidance:g}, eta {spec.eta:g}, seed {seed}{used}"
    return Subject(f"{run.title}, {arguments.policy}", sampling, pictures)


def _pipeline(arguments: argparse.Namespace) -> Subject:
    options = _call_options(arguments.call or [])
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    pipeline = PipelinePictures(arguments.pipeline, options, arguments.device, DTYPES[dtype])
    seed = arguments.seed or 0

    def pictures(prompt: Prompt) -> ByteArray:
        return pipeline.pictures(prompt, seed, arguments.images_per_prompt)

    call = ", ".join(f"{name}={value}" for name, value in options.items()) or "the pipeline's own defaults"
    return Subject(arguments.pipeline.resolve().name, f"{call}; {dtype}, seed {seed}", pictures)


def _call_options(texts: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--call {text}: write --call NAME=VALUE, an argument of the pipeline's call")
        options[name] = _call_value(value, f"--call {name}")
    return options


def _call_value(text: str, origin: str) -> Any:
    """A number, list, true, false or null as JSON has them; anything else is text, as it was typed."""
    try:
        return strict_json.parse(text)
    except ValueError as error:
        if text[:1] in tuple('[{"') or text.lower() in NEARLY_JSON or _is_number(text):
            raise ConfigError(f"{origin}: {text} is not JSON: {error}; write true, null, 0.5, [1, 0.5]") from error
        return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _document(subject: Subject, counts: str, scored: Sequence[ScoredPrompt], infos: Mapping[str, ServerInfo]) -> str:
    units = {name: PUBLISHED_UNITS.get(info.implementation, 1.0) for name, info in infos.items()}
    parts = [
        f"# {subject.name}",
        f"{counts}. {subject.sampling}.",
        markdown_table("", {subject.name: table(scored, units)}),
        "± is the 95 % confidence interval of the mean over prompts (each the mean over its images): normal, 1.96 "
        "standard errors." + _notes(scored, units),
    ]
    by_tag = tables_by_tag(scored, units)
    if by_tag:
        parts += ["## By tag", markdown_table("tag", by_tag)]
    lines = [
        f"| {name} | {info.implementation or info.scorer} | {info.version} | `{info.weights_hash}` |"
        for name, info in infos.items()
    ]
    parts += ["## Rewards", "\n".join(["| reward | scorer | version | weights |", "| --- | --- | --- | --- |", *lines])]
    parts += ["![The first prompts and their pictures](grid.png)"]
    return "\n\n".join(parts) + "\n"


def _notes(scored: Sequence[ScoredPrompt], units: Mapping[str, float]) -> str:
    scaled = [f"{name} times {factor:g}" for name, factor in units.items() if factor != 1.0]
    notes = f" In published units: the servers' {', '.join(scaled)}." if scaled else ""
    if "geneval" in units and all(one.tag is not None for one in scored):
        notes += " GenEval is the mean over tags, as published."
    return notes


def _check_options(arguments: argparse.Namespace) -> None:
    """ConfigError for an option that does not apply to the evaluated model."""
    idle, kind = (OF_RUNS, "pipeline") if arguments.run is None else (OF_PIPELINES, "run")
    for name in idle:
        if vars(arguments)[name] is not None:
            hint = (
                "its steps are --call num_inference_steps=N" if kind == "pipeline" else "it samples as it was trained"
            )
            raise ConfigError(f"--{name} does not fit --{kind}: {hint}; leave it out")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtdmd evaluate", description="Score a run or a diffusers pipeline on a prompt file."
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=user_path, metavar="DIR", help="run directory, or one of its checkpoints")
    subject.add_argument("--pipeline", type=user_path, metavar="DIR", help="any diffusers text-to-image pipeline")
    parser.add_argument(
        "--prompts", type=user_path, required=True, metavar="FILE", help="prompt file: .txt, .jsonl or .parquet"
    )
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="use only the first N prompts")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="NAME=URL", help="a running reward server; repeat for several"
    )
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME=SCORER[,MODEL_DIR]",
        help="start this reward server on the CPU while the command runs; repeat for several. Without --reward and "
        "--scorer the rewards are those of the run",
    )
    parser.add_argument(
        "--images-per-prompt", type=at_least_one, default=4, metavar="N", help="images per prompt (default 4)"
    )
    add_sampling_options(parser)
    parser.add_argument(
        "--call",
        action="append",
        metavar="NAME=VALUE",
        help="with --pipeline: an argument of its call, VALUE as in JSON or text; repeat for several",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="with --pipeline: its type (default float32, on a GPU bfloat16)"
    )
    timeout_s = RewardClientConfig().timeout_s
    parser.add_argument(
        "--timeout-s",
        type=some_time,
        default=timeout_s,
        metavar="S",
        help=f"timeout of one reward request in seconds (default {timeout_s:g})",
    )
    parser.add_argument(
        "--grid-prompts", type=at_least_one, default=8, metavar="N", help="prompts in grid.png (default 8)"
    )
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="DIR", help="directory for tables, scores and grid"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Return the exit status as in `learner.tools.options.tool_status`."""
    arguments = _build_parser().parse_args(argv)
    return tool_status(lambda: print(evaluate(arguments)), arguments.out)
