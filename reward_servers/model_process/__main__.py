"""`python -m reward_servers.model_process FD PARENT`, as a server starts it."""

from __future__ import annotations

import sys

from reward_servers.model_process.child import main

sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
