"""Code that all services share. Importing it sets the environment variables that libraries read when they are imported.

The other packages import this one first, so each of our processes passes here, however it was started.
"""

import os

WAIT_POLICY = "OMP_WAIT_POLICY"

# OpenMP reads it once, when torch is loaded. By default its idle threads spin: on a busy machine they occupy the core
# that the thread they wait for needs.
os.environ.setdefault(WAIT_POLICY, "PASSIVE")
# transformers also reports which image processor it falls back to; only its errors are useful here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
