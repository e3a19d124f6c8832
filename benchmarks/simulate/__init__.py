"""Simulates a run on a large cluster: the driver's own code in virtual time, on simulated workers and network."""
