"""Errors of a model process, as they travel to its server: the same type and text on both sides."""

from __future__ import annotations

import logging
from typing import Any

from common.command import system_error
from common.errors import (
    ConfigError,
    ModelError,
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    RtdmdError,
    one_line,
)

OF_LOADING: tuple[type[RtdmdError], ...] = (ConfigError, ModelError)
OF_CALLS: tuple[type[RewardError], ...] = (RewardOverloaded, RewardRejected, RewardInvalid, RewardUnavailable)
LOADING = {kind.__name__: kind for kind in OF_LOADING}
CALLS = {kind.__name__: kind for kind in OF_CALLS}

logger = logging.getLogger(__name__)


def of_loading(error: Exception, what: str) -> dict[str, Any]:
    """Describe an error of loading `what`. The log has the traceback of one that is not ours."""
    message = str(error)
    if isinstance(error, OSError):
        message = system_error(error)
    elif not isinstance(error, RtdmdError):
        message = f"{what} cannot be loaded: {type(error).__name__}: {one_line(error)}; its traceback is above"
        logger.error("%s cannot be loaded", what, exc_info=error)
    kind = next((kind for kind in OF_LOADING if isinstance(error, kind)), ModelError)
    return {"error": kind.__name__, "message": message}


def of_call(error: Exception, name: str) -> dict[str, Any]:
    """Describe an error of a call. One that is not ours becomes the scorer's failure; the log has its traceback."""
    if not isinstance(error, RewardError):
        logger.error("the scorer %s failed", name, exc_info=error)
        error = RewardInvalid(name, "scorer", f"{type(error).__name__}: {error}")
    kind = next((kind for kind in OF_CALLS if isinstance(error, kind)), RewardUnavailable)
    described = {"error": kind.__name__, "message": str(error), "reward": error.reward, "cause": error.cause}
    return described | ({"retry_after": error.retry_after} if isinstance(error, RewardOverloaded) else {})


def raise_described(message: dict[str, Any]) -> None:
    """Raise the error that a reply describes, if it does."""
    kind, text = message.get("error"), message.get("message", "")
    if kind in LOADING:
        raise LOADING[kind](text)
    if kind == RewardOverloaded.__name__:
        raise RewardOverloaded(message["reward"], message["cause"], text, message["retry_after"])
    if kind in CALLS:
        raise CALLS[kind](message["reward"], message["cause"], text)
