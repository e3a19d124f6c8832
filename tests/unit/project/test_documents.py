"""The documents' links and pictures: a picture whose markup is broken shows nothing, and nobody is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "deploy/**/*.md", "reward_servers/*.md")
    for path in PROJECT_ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\[\]]*\]\(([^()\s]+)\)")


def targets(text: str) -> list[str]:
    return [target for target in LINK.findall(text) if not target.startswith(("http://", "https://", "#"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    found = targets(document.read_text(encoding="utf-8"))
    assert [one for one in found if not (document.parent / one.split("#")[0]).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_picture_lost_its_file(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.count("![") == len(re.findall(r"!\[[^\[\]]*\]\([^()\s]+\)", text))


def test_the_readme_shows_the_gallery() -> None:
    assert "docs/images/shapes_gallery.png" in targets((PROJECT_ROOT / "README.md").read_text(encoding="utf-8"))
