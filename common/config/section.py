"""Base class of the run file's sections, and their errors (see `common.config.run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _home_is_expanded(cls, value: Any) -> Any:
        """`~` in a path means what it means in a shell, wherever the path was written."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise PydanticCustomError("home", "There is no home directory for ~: write the whole path") from error


def problem(key: str, message: str) -> PydanticCustomError:
    """A cross-field error about `key` (relative to the section that raises it); `run_file` words the message."""
    return PydanticCustomError("cross_field", "{message}", {"key": key, "message": message})
