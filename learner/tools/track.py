"""Command `rtdmd track`: sends a run to an experiment tracker, or what the tracker has missed of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.command import exit_status, user_path
from common.config.trackers import TrackerKind
from common.errors import RtdmdError, one_line
from learner.preflight.run_file import load_saved_config
from learner.records.trackers.feed import Feed
from learner.records.trackers.protocol import require_installed


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd track RUN_DIR wandb`; the exit status is 1 when the tracker cannot be used."""
    parser = argparse.ArgumentParser(
        prog="rtdmd track",
        description="Send a run to an experiment tracker: everything, or what it does not have yet.",
    )
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="directory of the run, such as runs/NAME")
    parser.add_argument("kind", choices=[kind.value for kind in TrackerKind], help="the tracker")
    parser.add_argument("--project", help="its project or experiment (default: trackers.project of the run)")
    return exit_status(lambda: _track(parser.parse_args(argv)))


def _track(options: argparse.Namespace) -> None:
    config = load_saved_config(options.run_dir / "config.yaml")
    kind = TrackerKind(options.kind)
    require_installed([kind])
    if options.project:
        trackers = config.trackers.model_copy(update={"project": options.project})
        config = config.model_copy(update={"trackers": trackers})
    feed = Feed(options.run_dir, config, kind)
    try:
        count = feed.send()
        feed.close()
    except (RtdmdError, OSError):
        raise
    except Exception as error:
        raise RtdmdError(
            f"{kind}: {one_line(error).rstrip('.')}; what was not sent is sent by the same command"
        ) from error
    print(f"{count} lines of {options.run_dir} were sent to {kind}")
