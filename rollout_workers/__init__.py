"""Rollout workers: sample, decode and score whole groups."""

import common  # noqa: F401 - before torch, see there
