"""Scorers. Each imports its own libraries, and only a server started with its name imports it."""
