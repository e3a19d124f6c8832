"""Base class of the run file's sections, and their errors (see `common.config.run`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def problem(key: str, message: str) -> PydanticCustomError:
    """A cross-field error about `key` (relative to the section that raises it); `run_file` words the message."""
    return PydanticCustomError("cross_field", "{message}", {"key": key, "message": message})
