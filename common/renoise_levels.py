"""Bounds of the renoise level, shared by the formulas and the checks before a start. Imports nothing."""

RENOISE_MARGIN = 0.01
"""The level of a sub-interval that starts at s is at least s + 0.01: close to s the forward kernel has no width."""
RENOISE_MIN = 0.02
"""Lowest level: close to 0 a velocity contains no information about the noise."""
RENOISE_MAX = 0.98
"""Highest level: close to 1 a velocity contains no information about the image."""
