"""Reward servers: HTTP servers for one or more scorers, each in its own process."""
