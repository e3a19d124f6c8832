"""A mutant, and the way a process runs one: its source is served in place of the file's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

REPOSITORY = Path(__file__).parents[2]


class TableError(Exception):
    """A mutant does not say what it should: the fault is the table's, not the test's."""


@dataclass(frozen=True)
class Mutant:
    """A wrong change to one source file.

    Attributes:
        name: what it means for the method.
        file: the source, relative to the repository.
        before, after: the text, which occurs once in the file, and what stands in its place.
        test: node id of a unit test that must fail.
    """

    name: str
    file: str
    before: str
    after: str
    test: str

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")

    def source(self, root: Path = REPOSITORY) -> str:
        """The mutated source.

        Raises:
            TableError: `before` does not occur exactly once, or nothing is changed.
        """
        original = (root / self.file).read_text(encoding="utf-8")
        count = original.count(self.before)
        if count != 1:
            raise TableError(f"{self.name}: the text to replace occurs {count} times in {self.file}, not once")
        if self.before == self.after:
            raise TableError(f"{self.name}: changes nothing")
        return original.replace(self.before, self.after)


def unit_test(name: str) -> str:
    """The node id of `FOLDER/FILE::TEST` under tests/unit, whose names stand here without `test_`."""
    place, _, test = name.partition("::")
    folder, _, file = place.rpartition("/")
    return f"tests/unit/{folder}/test_{file}.py::test_{test}"


class MutantFinder(MetaPathFinder):
    """Finds one module, whose code is the mutant's; no file is changed and no bytecode is written.

    Attributes:
        served: whether it has been imported.
    """

    def __init__(self, mutant: Mutant, root: Path = REPOSITORY) -> None:
        self._module, self._path = mutant.module, root / mutant.file
        self._source = mutant.source(root)
        self.served = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        self.served = True
        loader = _TextLoader(fullname, str(self._path), self._source)
        return spec_from_file_location(fullname, self._path, loader=loader)


class _TextLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._text = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        return self._text
