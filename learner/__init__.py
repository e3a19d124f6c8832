"""The learner, and the driver that starts and connects all services."""

import common  # noqa: F401 - before torch, see there
