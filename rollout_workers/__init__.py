"""Rollout workers: sample, decode and score whole groups."""
