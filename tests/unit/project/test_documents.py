"""The documents: links and pictures have files, paths exist, and every page can be reached from the README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.preflight.command_line import parse
from reward_servers.scorers import BUILT_IN_SCORERS

PROJECT_ROOT = Path(__file__).resolve().parents[3]
README, INDEX = PROJECT_ROOT / "README.md", PROJECT_ROOT / "docs/index.md"
PACKAGES = ("common", "learner", "rollout_workers", "reward_servers", "zoo")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", *(f"{package}/*.md" for package in PACKAGES))
    for path in PROJECT_ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\[\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w./-])[\w./-]+\.py(?!\w)")
OPTION = re.compile(r"\b[a-z_]+(?:\.(?:NAME|[a-z_]+))+\b(?![*(])")
OPTIONS = set(re.findall(r"^\| `([\w.]+)` \|", (PROJECT_ROOT / "docs/configuration.md").read_text(), re.MULTILINE))
FILES = (".conf", ".csv", ".json", ".jsonl", ".log", ".md", ".py", ".txt", ".yaml")
HISTORY = PROJECT_ROOT / "CHANGELOG.md"
"""It may name what is gone."""


def name(path: Path) -> str:
    return str(path.relative_to(PROJECT_ROOT))


def targets(text: str) -> list[str]:
    return [target for target in LINK.findall(text) if not target.startswith(("http://", "https://", "#"))]


def reachable(start: Path) -> set[Path]:
    """The pages that links lead to, `start` among them."""
    found, waiting = set(), [start]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            linked = [target.split("#")[0] for target in targets(page.read_text(encoding="utf-8"))]
            waiting += [(page.parent / one).resolve() for one in linked if one.endswith(".md")]
    return found


def missing_paths(text: str, folder: Path) -> Iterator[str]:
    """Python files written as code that are neither in the project nor, for a package's own README, beside it."""
    own = folder.parent == PROJECT_ROOT and folder.name in PACKAGES
    for path in (path for code in CODE.findall(text) for path in PATH.findall(code)):
        if ("/" in path or own) and not (PROJECT_ROOT / path).exists() and not (own and (folder / path).exists()):
            yield path


def unknown_options(text: str) -> list[str]:
    """Words written as code that look like an option of a section of ours, and are none."""
    sections = {option.partition(".")[0] for option in OPTIONS}
    words = [word for code in CODE.findall(text) for word in OPTION.findall(code)]
    known = OPTIONS | {option.rpartition(".")[0] for option in OPTIONS}
    named = [re.sub(r"^rewards\.[a-z_]+\.", "rewards.NAME.", word) for word in words]
    own = {word for word in named if word.partition(".")[0] in sections and not word.endswith(FILES)}
    return sorted(word for word in own - known if not module(word))


def module(word: str) -> bool:
    path = PROJECT_ROOT / word.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != HISTORY], ids=name)
def test_every_option_exists(document: Path) -> None:
    assert unknown_options(document.read_text(encoding="utf-8")) == []


def test_an_option_that_is_gone_would_be_found() -> None:
    text = "`alignment.grup_size: 8` and `alignment.group_size` and `rewards.hps.weight` and `rewards.hps.wait`"
    assert unknown_options(text) == ["alignment.grup_size", "rewards.NAME.wait"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    found = targets(document.read_text(encoding="utf-8"))
    assert [one for one in found if not (document.parent / one.split("#")[0]).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_picture_lost_its_file(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.count("![") == len(re.findall(r"!\[[^\[\]]*\]\([^()\s]+\)", text))


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != HISTORY], ids=name)
def test_every_path_in_code_exists(document: Path) -> None:
    assert list(missing_paths(document.read_text(encoding="utf-8"), document.parent)) == []


def test_a_path_that_is_gone_would_be_found() -> None:
    text = "`learner/gone.py`, `python common/flow.py --x`, `flow.py`, common/gone.py and `app.py`"
    assert list(missing_paths(text, PROJECT_ROOT / "docs")) == ["learner/gone.py"]
    assert list(missing_paths(text, PROJECT_ROOT / "common")) == ["learner/gone.py", "app.py"]


def test_every_page_can_be_reached_from_the_index() -> None:
    pages = set((PROJECT_ROOT / "docs").rglob("*.md"))
    assert {name(page) for page in pages - reachable(INDEX)} == set()


def test_the_index_lists_every_page() -> None:
    listed = {(INDEX.parent / target).resolve() for target in targets(INDEX.read_text(encoding="utf-8"))}
    assert {name(page) for page in set(INDEX.parent.rglob("*.md")) - {INDEX} - listed} == set()


def test_the_readme_links_to_the_index() -> None:
    assert "docs/index.md" in targets(README.read_text(encoding="utf-8"))


def test_the_readme_shows_the_gallery() -> None:
    assert "docs/images/shapes_gallery.png" in targets(README.read_text(encoding="utf-8"))


def test_the_readme_names_the_prompts_of_the_gallery() -> None:
    shown = re.findall(r"^\d\. (.+)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    prompts = (PROJECT_ROOT / "zoo/prompts/evaluation.txt").read_text(encoding="utf-8").splitlines()
    trained = set((PROJECT_ROOT / "zoo/prompts/train.txt").read_text(encoding="utf-8").splitlines())
    first = parse([], {}).config.evaluation.final_from
    assert shown == [prompt for prompt in prompts[first : first + 8] if prompt not in trained]


@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
def test_every_built_in_reward_is_in_the_table_of_rewards(scorer: str) -> None:
    lines = (PROJECT_ROOT / "docs/rewards.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| `{scorer}` |")] != []


def test_every_error_of_the_troubleshooting_page_is_one_of_ours() -> None:
    """The texts in the first column of its tables; `...` stands for values."""
    page = (PROJECT_ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    texts = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    ours = "\0".join(
        text for package in PACKAGES for path in (PROJECT_ROOT / package).rglob("*.py") for text in strings(path)
    )
    pieces = [piece.strip() for text in texts for piece in text.split("...")]
    assert [piece for piece in pieces if piece not in ours] == []
    assert len(texts) > 20


def strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
