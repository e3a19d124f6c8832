"""Rebuild every model of the zoo from seeds, and print its figures.

    python -m zoo.build [--out DIR] [--only pipeline]

Some parts are built only by name, with `checker` and `pipeline` beside them:

- `flux2`: the second family's pipelines, most of another hour
- `early_pipeline`: a teacher that was trained a third as long, a quarter of an hour
- `text_reader` and then `text`: the text world, most of another hour

Two parts are built at a time, each in a process with one thread: at these sizes two threads on one model gain far less.
Each part's figures are written to `figures.json` beside its weights. Training is deterministic on one machine. Another
machine may sum in another order and get different weights of the same quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from common.command import user_path
from common.project_files import python_command, python_environment
from zoo.checker.training import build_checker
from zoo.detector.training import build_detector
from zoo.flux2.pipeline import build_flux2
from zoo.judge.training import build_judge
from zoo.preference.training import build_hps, build_pickscore
from zoo.sd3.pipeline import build_early_pipeline, build_pipeline
from zoo.text.prompts import write_text_prompts
from zoo.world.prompts import write_prompts

WEIGHTS = Path(__file__).parent / "weights"
FIGURES = "figures.json"
AT_ONCE = 2


def build_text(out_dir: Path) -> dict[str, float]:
    """The import is deferred because the text world needs the packages of the `ocr` extra."""
    from zoo.text import pipeline

    return pipeline.build_text(out_dir)


def build_text_reader(out_dir: Path) -> dict[str, float]:
    """The import is deferred because the text world needs the packages of the `ocr` extra."""
    from zoo.text import reader_training

    return reader_training.build_text_reader(out_dir)


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    # In the order of their start: the longest first, together with the checker, which measures the pipeline's gold.
    "pipeline": build_pipeline,
    "checker": build_checker,
    "judge": build_judge,
    "pickscore": build_pickscore,
    "hps": build_hps,
    "detector": build_detector,
}
BY_NAME_ONLY: dict[str, Callable[[Path], dict[str, float]]] = {
    "early_pipeline": build_early_pipeline,
    "flux2": build_flux2,
    "text_reader": build_text_reader,
    "text": build_text,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, default=WEIGHTS, help="where the weights go (default zoo/weights)")
    parser.add_argument("--only", choices=[*PARTS, *BY_NAME_ONLY], help="build one part alone, in this process")
    arguments = parser.parse_args()
    write_prompts(Path(__file__).parent / "prompts")
    write_text_prompts(Path(__file__).parent / "prompts")
    started = time.monotonic()
    if arguments.only:
        _build_part(arguments.only, arguments.out / arguments.only)
    else:
        _build_all(arguments.out)
    for figures_file in sorted(arguments.out.glob(f"*/{FIGURES}")):
        print(figures_file.parent.name, figures_file.read_text())
    megabytes = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file()) / 1e6
    print(f"{arguments.out}: {megabytes:.1f} MB, {time.monotonic() - started:.0f} s")


def _build_all(out_dir: Path) -> None:
    """Build every part in its own process.

    Raises:
        CalledProcessError: a part failed and printed its reason; no further part is started.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        command = [*python_command("zoo.build"), "--out", str(out_dir), "--only"]
        running = [
            pool.submit(subprocess.run, [*command, part], check=True, env=python_environment()) for part in PARTS
        ]
        try:
            for part in as_completed(running):
                part.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _build_part(part: str, out_dir: Path) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    figures = (PARTS | BY_NAME_ONLY)[part](out_dir)
    figures["seconds"] = round(time.monotonic() - started, 1)
    (out_dir / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
