"""The reference values of the method's formulas, as tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 2e-5  # the file's own: float32 arithmetic, stored as doubles
REFERENCE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "reference_values.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def assert_near(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=TOLERANCE, atol=TOLERANCE)
