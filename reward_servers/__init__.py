"""Reward servers: HTTP servers for scorers, each in its own process; `remote_reward` asks them for other trainers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

_clash = find_spec("common")
if _clash is None or _clash.origin != str(Path(__file__).resolve().parents[1] / "common/__init__.py"):
    # `python -m` searches the current directory first, and there is a `common` of the user's: search it last.
    sys.path.append(sys.path.pop(0))
import common  # noqa: E402, F401 - before torch, see there

if TYPE_CHECKING:
    from reward_servers.remote import RemoteReward


def remote_reward(
    url: str | Sequence[str],
    name: str = "reward",
    *,
    timeout_s: float = 60.0,
    attempts: int = 3,
    images_per_request: int = 64,
) -> RemoteReward:
    """A reward server's scores as a reward function of TRL's shape, with the token of REWARD_SERVER_TOKEN.

    `url` may be a list of equal servers. `reward_servers.remote.RemoteReward` describes the other arguments, the
    errors, and the shape that DDPO and Flow-GRPO call.
    """
    # Imported here: a server does not need the client.
    from reward_servers.remote import RemoteReward

    urls = [url] if isinstance(url, str) else url
    return RemoteReward(urls, name, timeout_s=timeout_s, attempts=attempts, images_per_request=images_per_request)
