"""Experiments that test the method's claims: `python -m benchmarks.claims A`, see `__main__.py`."""
