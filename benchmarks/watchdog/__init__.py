"""Proves the watchdog on runs that hack their rewards, and on clean ones."""
