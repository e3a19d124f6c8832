"""Reward servers: one scorer behind HTTP, in a process of its own."""
