"""`python -m reward_servers.tiny DIR [--scorer NAME]`."""

from __future__ import annotations

import sys

from reward_servers.tiny.main import main

if __name__ == "__main__":
    sys.exit(main())
