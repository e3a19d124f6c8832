"""Common parts of the commands that use a run: options that name a run, and the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers

from common.command import exit_status, user_path
from common.errors import RtdmdError, one_line
from learner.tools.trained_run import ALIGNED_POLICY, POLICIES


def tool_status(command: Callable[[], None], out: Path) -> int:
    """Run a command without the libraries' progress bars; exit status as in `common.command.exit_status`.

    `out` is where the command writes.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    def named() -> None:
        try:
            command()
        except torch.OutOfMemoryError as error:
            raise RtdmdError(
                f"out of memory: {one_line(error)} Ask for fewer images per prompt, or use --device cpu"
            ) from error

    return exit_status(named, place=out)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for sampling with a run: see `common.policies.policy_spec`."""
    parser.add_argument("--base", type=user_path, metavar="DIR", help="directory of the base model, if it has moved")
    parser.add_argument(
        "--policy", choices=POLICIES, default=ALIGNED_POLICY, help=f"policy to sample (default {ALIGNED_POLICY})"
    )
    parser.add_argument(
        "--steps", type=at_least_one, metavar="N", help="sampling steps (default: those of the run's evaluations)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="C",
        help="the teacher's guidance scale (default: that of the run's evaluations)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="seed of the noise (default: that of the run, which gives the images of its own evaluations)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"torch device to sample on (default {device})")


def at_least_one(text: str) -> int:
    """Argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
