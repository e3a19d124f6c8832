"""`python -m reward_servers --scorer hps --model DIR --port N`."""

from __future__ import annotations

import sys

from reward_servers.main import main

sys.exit(main())
