"""Makes torchvision importable where its compiled part cannot load; `make judge-env` installs this beside vLLM.

PyPI's torchvision is linked against CUDA. With a CPU build of torch its library does not load, yet the import continues
to describe two operators of that library (nms, qnms) and fails. A start-up file (`.pth`) of the environment imports
this module. Just before torchvision is first imported, the two operators are declared without an implementation:
calling one still raises an error. The image processors of Qwen-VL call neither. Standard library and torch alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

DECLARED = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(MetaPathFinder):
    """Finds no module itself: the import of `torchvision` calls it once, and it prepares that import."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec("torchvision")
            if found is not None and found.origin is not None:
                declare_missing(Path(found.origin).parent)
        return None


def declare_missing(package: Path) -> None:
    """Declare the operators unless the package's own library defines them."""
    import torch

    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    declarations = torch.library.Library("torchvision", "FRAGMENT")
    for name in DECLARED:
        declarations.define(name + SIGNATURE)
    # The declarations last as long as this object.
    _kept.append(declarations)


_kept: list[object] = []
sys.meta_path.insert(0, DeclareOperators())
