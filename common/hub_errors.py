"""The reason why the Hugging Face hub does not give something, with the remedy."""

from __future__ import annotations

import os

from common.errors import one_line

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Each of them forbids the hub's client to use the network. The client reads the first that is not empty."""


def not_given(error: Exception, otherwise: str = "") -> str:
    """The end of a sentence about a hub name, for the error that the hub's client raised.

    Args:
        otherwise: one more remedy, such as "name a directory".
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        name = next((name for name in OFFLINE_VARIABLES if os.environ.get(name)), OFFLINE_VARIABLES[0])
        reason = f"{name} = {os.environ.get(name, '1')} forbids downloads, and the hub's cache here does not have it"
        return f"{reason}; {_either(f'unset {name}', otherwise)}"
    remedies = ("check the name", "log in (hf auth login, or HF_TOKEN) and accept its terms where it is gated")
    return f"the hub does not give it: {one_line(error).rstrip('.')}; {_either(*remedies, otherwise)}"


def _either(*remedies: str) -> str:
    *first, last = [remedy for remedy in remedies if remedy]
    return f"{', '.join(first)}, or {last}" if first else last
