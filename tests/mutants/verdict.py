"""The result of pytest: the tests that failed, and whether by an assertion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

KILLED, SURVIVED, ERROR = "killed", "SURVIVED", "ERROR"


@dataclass
class Verdict:
    """The outcome of one run of pytest.

    Attributes:
        exit_code: pytest's.
        passed: how many tests passed.
        failed: node ids of the tests whose own code failed by an assertion.
        broken: node id or file: what else went wrong, in collection, in a fixture, or by another exception.
        served: whether the mutated module was imported.
    """

    exit_code: int = 0
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    served: bool = True

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def judged(self) -> tuple[str, str]:
        """KILLED, SURVIVED or ERROR, and why it is an error: of the mutant, which proves nothing then."""
        if not self.served:
            return ERROR, "its test never imports the mutated file"
        if self.failed:
            return KILLED, ""
        if self.broken:
            return ERROR, "no assertion failed: " + ", ".join(f"{name}: {why}" for name, why in self.broken.items())
        if self.exit_code != 0 or not self.passed:
            return ERROR, f"pytest ended with {self.exit_code} after {self.passed} passed tests"
        return SURVIVED, ""

    @classmethod
    def read(cls, path: Path) -> Verdict:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Recorder:
    """A pytest plugin that fills in a verdict."""

    def __init__(self) -> None:
        self.verdict = Verdict()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if report.failed and call.excinfo is not None:
            if call.when == "call" and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception)):
                self.verdict.failed.append(item.nodeid)
            else:
                self.verdict.broken[item.nodeid] = f"{call.when}: {call.excinfo.exconly()}"
        elif report.passed and call.when == "call":
            self.verdict.passed += 1
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.verdict.broken[report.nodeid] = f"collection: {report.longreprtext.splitlines()[-1]}"
