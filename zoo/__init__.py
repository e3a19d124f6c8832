"""The shapes world: its models, and the recipes that build them."""

import sys
from importlib.util import find_spec
from pathlib import Path

_clash = find_spec("common")
if _clash is None or _clash.origin != str(Path(__file__).resolve().parents[1] / "common/__init__.py"):
    # `python -m` searches the current directory first, and there is a `common` of the user's: search it last.
    sys.path.append(sys.path.pop(0))
import common  # noqa: E402, F401 - before torch, see there
