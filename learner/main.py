"""Commands that train and that forecast a run.

    rtdmd train --config deploy/runs/shapes.yaml
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python learner/main.py

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

from common.command import exit_status
from learner.preflight.command_line import parse, parse_forecast

# transformers also logs which image processor it falls back to; only its errors are useful here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(argv: Sequence[str]) -> int:
    """Train; exit status as in `common.command.exit_status`."""
    signal.signal(signal.SIGTERM, _interrupt)

    def train() -> None:
        invocation = parse(argv, os.environ)
        from learner.compose import run

        run(invocation)

    return exit_status(train, interrupted="interrupted; continue with --resume")


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
