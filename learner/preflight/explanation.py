"""`rtdmd train --explain`: for a run file, which values are published, vetted here, or the user's own.

    published      the value of the authors' configuration of this model (`learner/preflight/published.py`)
    vetted here    another value that this project runs: the default, or that of one of its run files of this model
    yours          any other value

One line per option that has a published value or is not at its default, as far as the run's stages use it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from common.config.run import Config
from common.config.section import Section
from common.project_files import PROJECT_ROOT
from learner.preflight.command_line import parse
from learner.preflight.published import BACK_PROPAGATED, NOTES, SHARED, TRAINED, Model, Value, flat, model_of
from learner.preflight.run_file import RUN_FILES

IN_BOTH_STAGES = ("cold_start.consistency_fraction", "cold_start.fake_max_weight")
"""Options of the cold start that stage 2 uses too."""
OF_PROMPTS = {
    "prompts.train": "PickScore's training prompts in stage 1, GenEval's in stage 2 (rtdmd prompts)",
    "prompts.cold_start": "PickScore's training prompts (rtdmd prompts pickscore)",
    "prompts.evaluation": "DrawBench and sets of their own for four rewards (docs/method.md, Departures)",
}
"""Published prompts, in words: a path says nothing about its content."""
LONGEST_VALUE = 60


class Standing(StrEnum):
    """Where a value stands."""

    PUBLISHED = "published"
    VETTED = "vetted here"
    YOURS = "yours"


@dataclass(frozen=True)
class Explained:
    """One option. `published` is the published value in words where it is another one, else a note on it, or ""."""

    key: str
    value: Value
    standing: Standing
    published: str


def explanation(config: Config) -> str:
    """The text of `--explain`."""
    model, lines = model_of(config), explained(config)
    width = max(len(line.key) for line in lines)
    values = {line.key: shown(line.value) for line in lines}
    value_width = max(len(value) for value in values.values())
    rows = []
    for line in lines:
        note = f"published: {line.published}" if line.standing is not Standing.PUBLISHED else line.published
        note = f"  {note}" if line.published else ""
        rows.append(f"{line.key:{width}}  {values[line.key]:{value_width}}  {line.standing:11}{note}".rstrip())
    counts = Counter(line.standing for line in lines)
    total = ", ".join(f"{counts[standing]} {standing}" for standing in Standing)
    return "\n".join([*_head(config, model), "", *rows, "", total])


def _head(config: Config, model: Model | None) -> Iterator[str]:
    path = config.backbone.path
    if model is None:
        yield f"{path} is no published model: its values are compared with those that all published models share."
    else:
        yield f"Compared with the published settings of {model.title} (github.com/Harahan/RTDMD at 6c3cb03)."
    if not _runs_cold_start(config):
        source = config.cold_start.from_checkpoint
        yield f"Stage 2 alone, from {source or 'the teacher'}: options of stage 1 have no effect."
    elif not _runs_alignment(config):
        yield "Stage 1 alone: options of stage 2 have no effect."
    yield "vetted here: a default, or a value of one of the project's run files of this model. yours: not checked here."


def explained(config: Config) -> list[Explained]:
    """Every option that matters, in the order of the schema."""
    model = model_of(config)
    published: Mapping[str, Value] = SHARED if model is None else model.values
    values, defaults = flat(config), _defaults(config)
    shown = [key for key, value in values.items() if key in published or value != defaults.get(key)]
    return [_explained(key, values[key], published, defaults, config) for key in shown if matters(key, config)]


def _explained(
    key: str, value: Value, published: Mapping[str, Value], defaults: Mapping[str, Value], config: Config
) -> Explained:
    if key in published and value == published[key]:
        return Explained(key, value, Standing.PUBLISHED, NOTES.get(key, ""))
    vetted = key in defaults and value == defaults[key]
    vetted = vetted or value in _measured(config.backbone.path).get(key, ())
    words = OF_PROMPTS.get(key, "")
    if key in published:
        note = NOTES.get(key)
        words = shown(published[key]) + (f" ({note})" if note else "")
    return Explained(key, value, Standing.VETTED if vetted else Standing.YOURS, words)


def _runs_cold_start(config: Config) -> bool:
    return config.cold_start.iterations > 0 and config.cold_start.from_checkpoint is None


def _runs_alignment(config: Config) -> bool:
    return config.alignment.iterations > 0


def matters(key: str, config: Config) -> bool:
    """Whether the stages that run use this option."""
    if key.startswith("cold_start.") and key not in IN_BOTH_STAGES:
        return _runs_cold_start(config) or key == "cold_start.from_checkpoint"
    if key.startswith("alignment.") or key in (TRAINED, BACK_PROPAGATED):
        return _runs_alignment(config)
    return True


def _defaults(config: Config) -> dict[str, Value]:
    """The schema's default of every option that has one, as `flat` has its value."""
    found: dict[str, Value] = {}
    for name in type(config).model_fields:
        section: Any = config.__dict__[name]
        if isinstance(section, Section):
            for key, field in type(section).model_fields.items():
                if not field.is_required():
                    found[f"{name}.{key}"] = json.loads(json.dumps(field.default, default=str))
    return found


@cache
def _measured(model: Path) -> dict[str, Sequence[Value]]:
    """Values of the project's run files of this model, by option, if the model comes with the project.

    Other models cannot be run here.
    """
    found: dict[str, list[Value]] = {}
    if not (model.exists() and model.resolve().is_relative_to(PROJECT_ROOT)):
        return {}
    for path in sorted(RUN_FILES.glob("*.yaml")):
        config = parse(["--config", str(path)], {}).config
        if config.backbone.path.resolve() == model.resolve():
            for key, value in flat(config).items():
                found.setdefault(key, []).append(value)
    return dict(found)


def shown(value: Value) -> str:
    """A value as a run file has it, on one line and shortened."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        text = value
    elif isinstance(value, dict):
        text = ", ".join(f"{name} {weight:g}" for name, weight in value.items()) or "none"
    elif isinstance(value, list):
        text = f"[{', '.join(map(str, value))}]"
    else:
        text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."
