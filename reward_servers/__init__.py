"""Reward servers: HTTP servers for one or more scorers, each in its own process."""

import common  # noqa: F401 - before torch, see there
