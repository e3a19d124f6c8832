"""docs/metrics.md: generated from the catalogue, complete, and up to date."""

from __future__ import annotations

from pathlib import Path

from common.metrics import CATALOGUE
from learner.records.metrics_page import metrics_page

PAGE = Path(__file__).resolve().parents[4] / "docs/metrics.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), (
        "docs/metrics.md differs from the catalogue: run `python -m learner.records.metrics_page > docs/metrics.md`"
    )


def test_every_metric_and_key_has_its_place() -> None:
    page = metrics_page()
    assert [spec.name for spec in CATALOGUE if f"| `{spec.name}`" not in page] == []
    assert "| Norm of a network's gradient before clipping. | `student_gradient_norm` (student), " in page
