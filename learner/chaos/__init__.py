"""Breaks a run on purpose and proves that it heals: `python -m learner.chaos --help`."""
