"""Makes the preset tables of docs/backbones.md: published values, our run files, and how far each model is verified.

python -m learner.preflight.preset_tables
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.config.run import Config
from common.project_files import PROJECT_ROOT
from learner.preflight.command_line import parse
from learner.preflight.explanation import matters, shown
from learner.preflight.published import MODELS, NOTES, SHARED, Model, flat

RUNS = Path("deploy/runs")
STAGES = ("cold_start", "rtdmd")
TINY = {
    "SD3-M": "`test_sd3`, `test_alignment_trainer`, `test_cold_start_trainer`",
    "SD3.5-M": "`test_families` (sd35m)",
    "FLUX.2-klein 4B": "`test_flux2`, `test_families` (flux2)",
    "FLUX.2-klein 9B": "the same class as 4B",
    "FLUX.1-dev": "`test_flux1`, `test_families` (flux1)",
}
"""Tests with a tiny random model of the same classes."""
COUNTED = {"SD3.5-M": "`python -m benchmarks.count`", "FLUX.2-klein 4B": "`python -m benchmarks.count`"}
"""Commands that count the kernels, bytes and FLOPs of the model in its full size, without its weights."""
GPU: Mapping[str, str] = {}
"""Measurements of the full-size model on a GPU; none yet."""


def preset_tables() -> str:
    """The tables as Markdown."""
    return "\n\n".join(["\n".join(_by_model()), "\n".join(_shared()), "\n".join(_verified())]) + "\n"


def _by_model() -> Iterator[str]:
    yield from _head("published", *(model.title for model in MODELS), "our run files")
    for key in _own_keys():
        yield _row(f"`{key}`", *(_published(model, key) for model in MODELS), _difference(key, MODELS))
    yield _row("run files", *(f"`*_{model.run_file}.yaml`" for model in MODELS), "")


def _shared() -> Iterator[str]:
    yield from _head("published, all models", "value", "our run files")
    for key, value in SHARED.items():
        note = f"; {NOTES[key]}" if key in NOTES else ""
        name = f"`{key}`" if "(" not in key else key
        yield _row(name, f"{shown(value)}{note}", _difference(key, MODELS))


def _verified() -> Iterator[str]:
    yield from _head(
        "how far verified", "tiny model, parity with diffusers", "full size, counted", "full size on a GPU"
    )
    for model in MODELS:
        yield _row(model.title, TINY[model.title], COUNTED.get(model.title, "no"), GPU.get(model.title, "not yet"))


def _own_keys() -> list[str]:
    keys = [key for model in MODELS for key in model.own]
    return list(dict.fromkeys(keys))


def _published(model: Model, key: str) -> str:
    return shown(model.own[key]) if key in model.own else "-"


def _difference(key: str, models: Sequence[Model]) -> str:
    """The values of our run files where they are not the published ones, or "the same"."""
    found = set()
    for model in models:
        for config in run_files(model):
            value = flat(config).get(key)
            if key in model.values and matters(key, config) and value != model.values[key]:
                found.add(shown(value))
    return ", ".join(sorted(found)) or "the same"


def run_files(model: Model) -> tuple[Config, ...]:
    """Our run files of a published model: stage 1, stage 2."""
    paths = (PROJECT_ROOT / RUNS / f"{stage}_{model.run_file}.yaml" for stage in STAGES)
    return tuple(parse(["--config", str(path)], {}).config for path in paths)


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield f"|{'---|' * len(cells)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(preset_tables(), end="")
