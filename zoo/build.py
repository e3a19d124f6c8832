"""Rebuild every model of the zoo from seeds, and print what each of them reaches.

    python -m zoo.build [--out DIR] [--only pipeline]

Writes the figures to `figures.json` beside the weights. Training is deterministic on one machine; on another, sums in
another order give other weights of the same quality.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.checker_training import build_checker
from zoo.detector_training import build_detector
from zoo.pipeline import build_pipeline
from zoo.preference_training import build_hps, build_pickscore
from zoo.prompts import write_prompts

WEIGHTS = Path(__file__).parent / "weights"

PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "checker": build_checker,
    "detector": build_detector,
    "hps": build_hps,
    "pickscore": build_pickscore,
    # Last: its figures are told by the checker.
    "pipeline": build_pipeline,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go (default zoo/weights)")
    parser.add_argument("--only", choices=list(PARTS), help="build one part alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_prompts(Path(__file__).parent / "prompts")
    figures_file = arguments.out / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    for part in [arguments.only] if arguments.only else list(PARTS):
        started = time.monotonic()
        figures[part] = PARTS[part](arguments.out / part)
        figures[part]["seconds"] = round(time.monotonic() - started, 1)
        print(part, json.dumps(figures[part], indent=1), flush=True)
        figures_file.write_text(json.dumps(figures, indent=1) + "\n")
    megabytes = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file()) / 1e6
    print(f"{arguments.out}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
