"""The shapes world: its models, and the recipes that build them."""

import common  # noqa: F401 - before torch, see there
