"""The mutants' table says what it should, and the mutated source is what gets imported."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.mutant import REPOSITORY, Mutant, MutantFinder, TableError
from tests.mutants.reach import reaching_tests
from tests.mutants.table import MUTANTS
from tests.mutants.verdict import ERROR, KILLED, SURVIVED, Verdict


def test_every_text_to_replace_occurs_once_and_leaves_valid_python() -> None:
    for mutant in MUTANTS:
        assert ast.parse(mutant.source()).body, mutant.name


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(set(names)) == sorted(names)


def test_every_test_that_is_named_is_there() -> None:
    functions: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        file, _, test = mutant.test.partition("::")
        if file not in functions:
            tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test.partition("[")[0] in functions[file], mutant.test


SAMPLE = Mutant("three for two", "mutated_package/part.py", "ANSWER = 2", "ANSWER = 3", "unused")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The root of a package that Python finds."""
    (tmp_path / "mutated_package").mkdir()
    (tmp_path / "mutated_package" / "__init__.py").touch()
    (tmp_path / "mutated_package" / "part.py").write_text("ANSWER = 2\nTWICE = ANSWER * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in ("mutated_package", "mutated_package.part"):
        sys.modules.pop(name, None)


def test_the_mutated_source_is_what_gets_imported(package: Path) -> None:
    before = (package / SAMPLE.file).read_bytes()
    finder = MutantFinder(SAMPLE, package)
    sys.meta_path.insert(0, finder)
    assert not finder.served
    assert importlib.import_module("mutated_package.part").TWICE == 6
    assert finder.served
    assert (package / SAMPLE.file).read_bytes() == before
    assert not list(package.rglob("part.*.pyc"))


@pytest.mark.parametrize(
    ("content", "expected"), [("ANSWER = 1", "occurs 0 times"), ("ANSWER = 2\nANSWER = 2", "occurs 2 times")]
)
def test_a_text_that_does_not_occur_once_is_refused(package: Path, content: str, expected: str) -> None:
    (package / SAMPLE.file).write_text(content)
    with pytest.raises(TableError, match=f"three for two: .*{expected}"):
        SAMPLE.source(package)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(exit_code=1, failed=["test"]), KILLED),
        (Verdict(exit_code=0, passed=1), SURVIVED),
        (Verdict(exit_code=1, broken={"test": "call: NameError"}), ERROR),
        (Verdict(exit_code=2, broken={"file": "collection: ImportError"}), ERROR),
        (Verdict(exit_code=4), ERROR),
        (Verdict(exit_code=5), ERROR),
        (Verdict(exit_code=1, failed=["test"], served=False), ERROR),
    ],
)
def test_only_an_assertion_under_the_mutant_kills_it(verdict: Verdict, expected: str) -> None:
    assert verdict.judged()[0] == expected


def test_the_tests_that_reach_a_file_are_found_through_every_import() -> None:
    found = reaching_tests("common/backbones/flux1.py")
    assert "tests/unit/common/backbones/test_flux1.py" in found
    assert "tests/unit/learner/tools/test_generate.py" in found  # through `load_backbone`, which names it in a text
    assert "tests/unit/reward_servers/scorers/test_ocr.py" not in found
    assert {mutant.test.partition("::")[0] for mutant in MUTANTS} <= {
        test for file in {mutant.file for mutant in MUTANTS} for test in reaching_tests(file)
    }
