"""Bounds of the renoise level, which the math and the checks before a start share. Imports nothing."""

RENOISE_MARGIN = 0.01
"""The level of a sub-interval that starts at s is at least s + 0.01: next to s the forward kernel has no width."""
RENOISE_MIN = 0.02
"""The lowest level: next to 0 a velocity tells nothing about the noise."""
RENOISE_MAX = 0.98
"""The highest level: next to 1 a velocity tells nothing about the image."""
