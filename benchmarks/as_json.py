"""Output of a benchmark: JSON on the console and, if asked for, in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.command import user_path


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=user_path, metavar="FILE", help="write the JSON here too")


def show(found: Mapping[str, Any], out: Path | None) -> None:
    """Print what was found; write it to `out` as well, unless that is None."""
    text = json.dumps(found, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
