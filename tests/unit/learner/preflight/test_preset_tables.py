"""The preset tables of docs/backbones.md are those of the table of published values."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.preflight.preset_tables import COUNTED, GPU, TINY, preset_tables
from learner.preflight.published import MODELS

PROJECT_ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def tables() -> str:
    return preset_tables()


def test_the_page_has_the_tables_of_today(tables: str) -> None:
    page = (PROJECT_ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    assert tables in page, "paste the output of `python -m learner.preflight.preset_tables` into docs/backbones.md"


def test_every_model_is_in_the_tables_and_a_departure_is_named(tables: str) -> None:
    lines = tables.splitlines()
    assert any(line.startswith("| `alignment.group_size` | 16 | 24 | 24 | 24 | 24 | the same |") for line in lines)
    assert any(
        line.startswith("| `alignment.old_surrogate` | rollout") and line.endswith("| learner |") for line in lines
    )
    assert all(any(line.startswith(f"| {model.title} |") for line in lines) for model in MODELS)


def test_the_named_verifications_are_there() -> None:
    titles = {model.title for model in MODELS}
    assert set(TINY) == titles
    assert {*COUNTED, *GPU} <= titles
    named = {word for text in TINY.values() for word in text.split("`")[1::2]}
    assert [name for name in named if not list((PROJECT_ROOT / "tests/unit").rglob(f"{name}.py"))] == []
