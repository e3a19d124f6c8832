"""Commands that train and that forecast a run.

    rtdmd train --config deploy/runs/shapes.yaml
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python learner/main.py --run-dir /shared/runs/mine

Reads the command line and sets the exit status; `compose.py` starts everything else. Heavy libraries are imported only
after the command line has been validated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

if __name__ == "__main__":
    # Python puts this file's folder first. The project's root is needed instead, before any other package's `common`.
    if not sys.flags.safe_path:
        sys.path.pop(0)
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.command import exit_status
from learner.preflight.command_line import parse, parse_forecast
from learner.preflight.explanation import explanation
from learner.preflight.ray_environment import prepare

WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a closed terminal, and of a scheduler whose time is up. They would end Python without a word, and leave
processes of Ray."""


def main(argv: Sequence[str]) -> int:
    """Train; exit status as in `common.command.exit_status`."""
    signal.signal(signal.SIGTERM, _interrupt)
    for number in WARNINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: the run goes on
            signal.signal(number, _interrupt)

    def train() -> None:
        invocation = parse(argv, os.environ)
        if invocation.explain:
            print(explanation(invocation.config))
            return
        prepare(os.environ)  # before Ray is imported
        from learner.compose import run

        run(invocation)

    return exit_status(train, interrupted="interrupted before the run began")


def forecast(argv: Sequence[str]) -> int:
    """Print what a run will need; exit status as in `common.command.exit_status`."""

    def tell() -> None:
        config, device = parse_forecast(argv, os.environ)
        from learner.compose import forecast_text

        print(forecast_text(config, device))

    return exit_status(tell)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
