"""Finds a scorer's class by the name that a user gives, and loads it.

A scorer's libraries (torch, transformers, ...) are imported by name here, so a process without torch never loads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, ModelError
from common.project_files import import_own
from common.types import Precision
from reward_servers.scorers import BUILT_IN_SCORERS, MOVED_SCORERS
from reward_servers.scorers.base import Scorer

HUB_PARTS = 2
"""A name of the Hugging Face hub is organisation/name."""
CPU = "cpu"
REASON_CHARACTERS = 300
"""A library's message is cut to this many characters in ours."""


@dataclass(frozen=True)
class ScorerSettings:
    """One scorer to serve: a built-in name or package.module:Class, its model directory and its served name.

    Attributes:
        precision: type in which its model computes; None for that of its published recipe on this kind of device.
    """

    scorer: str
    model: Path | None
    name: str | None
    precision: Precision | None = None


def class_path(spec: str) -> str:
    """`package.module:Class` of a scorer; ConfigError if it is named neither so nor by a built-in name."""
    path = MOVED_SCORERS.get(spec) or BUILT_IN_SCORERS.get(spec, spec)
    if not path.partition(":")[2]:
        known = ", ".join(BUILT_IN_SCORERS)
        raise ConfigError(f"--scorer {spec}: neither one of {known} nor an import path package.module:Class")
    return path


def scorer_class(spec: str) -> type[Scorer]:
    """Import a scorer's class; ConfigError that names what is missing."""
    module_name, _, class_name = class_path(spec).partition(":")
    try:
        found = vars(import_own(module_name)).get(class_name)
    except ImportError as error:
        raise _missing(spec, error) from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ConfigError(f"--scorer {spec}: {module_name} has no subclass of Scorer named {class_name}")
    return found


def load(kind: type[Scorer], one: ScorerSettings, device: str) -> Scorer:
    """Load a scorer onto a device; ConfigError for a precision that it cannot compute in, before anything is read."""
    kind.require_precision(one.precision)
    default = None if is_cpu(device) else kind.gpu_precision
    try:
        scorer = kind.load(one.model, device)
    except ImportError as error:  # some libraries import others only when a model is built
        raise _missing(one.scorer, error) from error
    precision = one.precision or default
    if precision is not None and precision != scorer.precision:
        scorer.use(precision)
    return scorer


def is_cpu(device: str) -> bool:
    return device.partition(":")[0] == CPU


def require_directory(model: Path | None) -> None:
    """ModelError for a path that is no directory."""
    if model is not None and not model.is_dir():
        raise ModelError(f"--model {model} is not a directory{remedy(model)}")


def remedy(model: Path) -> str:
    """The end of an error: how to get a model directory from what was named."""
    if not model.is_absolute() and len(model.parts) == HUB_PARTS and not model.parent.exists():
        return (
            f": if this is a name of the Hugging Face hub, run `hf download {model} --local-dir DIR` (docs/rewards.md)"
        )
    if not model.is_file():
        return ""
    return (
        ", but a file: name the folder that it is in, or make a model directory from a published checkpoint with "
        "`python -m reward_servers.convert` (docs/rewards.md)"
    )


def _missing(spec: str, error: ImportError) -> ConfigError:
    """Some libraries report a missing package on a whole screen. This puts it on one line, with the install command."""
    reason = " ".join(str(error).split())
    if spec in BUILT_IN_SCORERS:
        extra = spec.removesuffix("_parts")
        return ConfigError(f"--scorer {spec}: {reason[:REASON_CHARACTERS]}; pip install -e '.[{extra}]'")
    return ConfigError(f"--scorer {spec}: {reason[:REASON_CHARACTERS]} (looked in the current directory as well)")
