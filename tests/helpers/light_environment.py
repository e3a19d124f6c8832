"""A pytest plugin for an environment without the heavy libraries: a test that needs one of them is skipped.

    python -m pytest -p tests.helpers.light_environment tests/unit

A test is skipped only if it raises ModuleNotFoundError for a library of `LEFT_OUT`. Any other failure stays a failure.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

LEFT_OUT = frozenset(
    {
        *("accelerate", "diffusers", "fsspec", "peft", "psutil", "ray", "rich", "tokenizers", "torch", "transformers"),
        *("cv2", "ftfy", "huggingface_hub", "onnxruntime", "pyarrow", "rapidocr", "scipy"),
    }
)
"""Libraries of the extras that the small environment does not install."""


class LightModule(pytest.Module):
    """A test file that is skipped if its import needs a library that is left out."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except self.CollectError as error:
            library = missing_library(error.__cause__)
            if library is None:
                raise
            pytest.skip(f"needs {library}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = LightModule.from_parent(parent, path=module_path)
    return module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a test, or the fixture of one, as skipped if it imported a library that is left out."""
    report = yield
    library = missing_library(call.excinfo.value) if call.excinfo is not None else None
    if library is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: needs {library}")
    return report


def missing_library(error: BaseException | None) -> str | None:
    """The left-out library that the import asked for; None for every other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    library = error.name.partition(".")[0]
    return library if library in LEFT_OUT else None
