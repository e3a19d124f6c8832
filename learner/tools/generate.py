"""Sample with a trained run.

    rtdmd generate --run runs/NAME --prompt "a red circle" --prompt "two dogs" --out pictures

Writes PROMPT-SAMPLE.png and prints the paths. Noise is a function of (seed, place of the prompt, sample), as in a run's
own evaluations: their prompt file and the run's seed give the same images. Needs no Ray and no reward server.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.command import user_path
from common.policies import policy_spec
from common.prompts import load_prompts, prompts_of
from common.torch_device import require_device
from common.types import Prompt
from common.visible_text import printable
from learner.records.pictures import save_png
from learner.tools.options import add_sampling_options, at_least_one, tool_status
from learner.tools.trained_run import TrainedRun
from rollout_workers.sampler import sample_pictures


def generate(arguments: argparse.Namespace) -> Iterator[Path]:
    """Write every image; yield the paths as they are written."""
    require_device(arguments.device)
    prompts = _prompts(arguments.prompt, arguments.prompts)
    run = TrainedRun.open(arguments.run, arguments.base)
    spec = policy_spec(run.config, arguments.policy, arguments.steps, arguments.guidance)
    seed = run.config.run.seed if arguments.seed is None else arguments.seed
    backbone = run.load(arguments.policy, arguments.device)
    empty = backbone.encode_prompts([""])
    for prompt in prompts:
        pictures_GHWC = sample_pictures(backbone, prompt, spec, seed=seed, count=arguments.count, empty=empty)
        for sample, picture_HWC in enumerate(pictures_GHWC):
            path = arguments.out / f"{prompt.index:04d}-{sample:02d}.png"
            save_png(picture_HWC, path)
            yield path


def _prompts(texts: Sequence[str] | None, file: Path | None) -> list[Prompt]:
    return prompts_of(texts or (), "--prompt") if file is None else load_prompts(file)


def main(argv: Sequence[str]) -> int:
    """Return the exit status as in `learner.tools.options.tool_status`."""
    parser = argparse.ArgumentParser(
        prog="rtdmd generate",
        description="Draw images with a trained run and print their paths.",
    )
    parser.add_argument(
        "--run", type=user_path, required=True, metavar="DIR", help="run directory, or one of its checkpoints"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    what.add_argument("--prompts", type=user_path, metavar="FILE", help="prompt file: .txt, .jsonl or .parquet")
    parser.add_argument("--count", type=at_least_one, default=1, metavar="N", help="images per prompt (default 1)")
    add_sampling_options(parser)
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="directory for the images")
    arguments = parser.parse_args(argv)

    def write_and_tell() -> None:
        for path in generate(arguments):
            print(printable(path), flush=True)

    return tool_status(write_and_tell, arguments.out)
