"""Scorers: each imports its own stack, and nothing imports them but the server that was told their name."""
