"""Reads PromQL expressions as far as tests need it: the selectors in an expression, and the metrics that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from common.metrics import CATALOGUE

PROJECT_ROOT = Path(__file__).resolve().parents[2]
RULES = PROJECT_ROOT / "deploy/prometheus/rules.yml"
OF_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity"}}
TARGET_LABELS = {"run", "reward", "job", "instance"}
"""The labels that a run's file gives to every series of its endpoints."""
WORDS = {"and", "or", "unless", "by", "on", "without", "ignoring", "group_left", "group_right", "bool", "offset"}
GROUPING = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
SELECTOR = re.compile(r"([A-Za-z_:][\w:]*+)(?!\s*\()\s*(\{[^}]*\})?")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


@dataclass(frozen=True)
class Selector:
    """A metric in an expression, with its matchers as they are written."""

    name: str
    matchers: str

    @property
    def labels(self) -> set[str]:
        return set(MATCHER.findall(TEXT.sub('""', self.matchers)))

    def __str__(self) -> str:
        return f"{self.name}{self.matchers}"


def selectors(expression: str) -> Iterator[Selector]:
    """Every selector of an expression, in order."""
    # The content of texts is hidden behind their numbers while names are looked for.
    texts: list[str] = []

    def hide(found: re.Match[str]) -> str:
        texts.append(found[0])
        return f'"#{len(texts) - 1}"'

    bare = TEXT.sub(hide, expression)
    bare = GROUPING.sub(" ", bare)
    bare = re.sub(r"\[[^\]]*\]|\boffset\s+\w+|(?<![\w.#])\d[\w.]*", " ", bare)
    for found in SELECTOR.finditer(bare):
        name, matchers = found[1], found[2] or ""
        if name not in WORDS:
            yield Selector(name, re.sub(r'"#(\d+)"', lambda text: texts[int(text[1])], matchers))


def recorded() -> dict[str, str]:
    """Recording rule -> its expression."""
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


@cache
def rules() -> list[dict[str, str]]:
    """All rules of deploy/prometheus/rules.yml."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def faults(expression: str) -> list[str]:
    """What in an expression the catalogue does not have: a metric, or a label of one."""
    known = {series: spec for spec in CATALOGUE for series in spec.series}
    found = []
    for selector in selectors(expression):
        if selector.name in known:
            spec = known[selector.name]
            labels = {*spec.all_labels, *TARGET_LABELS, *({"le"} if selector.name.endswith("_bucket") else ())}
        elif selector.name in OF_PROMETHEUS:
            labels = OF_PROMETHEUS[selector.name] | TARGET_LABELS
        elif selector.name in recorded():
            labels = {"run", *selector.name.partition(":")[0].split("_")}
        else:
            found.append(f"{selector.name} is no metric of the catalogue")
            continue
        found += [f"{selector.name} has no label {label}" for label in sorted(selector.labels - labels)]
    return found
