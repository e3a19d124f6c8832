"""docs/configuration.md: generated from the schema, complete, and up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.preflight.configuration_page import configuration_page
from learner.preflight.run_file import knobs

PAGE = Path(__file__).resolve().parents[4] / "docs/configuration.md"


def row(option: str) -> list[str]:
    """The cells of an option's first row."""
    lines = configuration_page(knobs()).splitlines()
    line = next(line for line in lines if line.startswith(f"| `{option}` |"))
    return [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_page(knobs()), (
        "docs/configuration.md differs from the schema: run "
        "`python -m learner.preflight.configuration_page > docs/configuration.md`"
    )


def test_every_option_has_a_row_and_a_description() -> None:
    rows = [line for line in configuration_page(knobs()).splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [knob.dotted for knob in knobs()]
    assert [line for line in rows if line.endswith("|  |")] == []


@pytest.mark.parametrize(
    ("option", "default", "values"),
    [
        ("alignment.surrogate", '`"squared_error"`', "`squared_error`, `gaussian`"),
        ("rewards.NAME.outage", '`"pause"`', "`pause`, `drop_group`, `renormalise`"),
        ("alignment.group_size", "`16`", "whole number >= 2"),
        ("sampling.eta", "`0.9`", "number >= 0 and <= 1"),
        ("alignment.reward_gradient_clip", "`null`", "number > 0 or `null`"),
        ("lora.targets", "`null`", "list of text, not empty or `null`"),
        ("prompts.train", "required", "path"),
        ("workers.compiled", "`false`", "`true`, `false`"),
        ("rewards.NAME.url", '`"local"`', "text or list of text"),
    ],
)
def test_a_row_says_default_and_values(option: str, default: str, values: str) -> None:
    assert row(option)[1:3] == [default, values]


def test_a_pipe_inside_a_cell_does_not_end_it() -> None:
    lines = configuration_page(knobs()).splitlines()
    counts = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert counts == {5}
