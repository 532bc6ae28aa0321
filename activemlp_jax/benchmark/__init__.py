"""Counts of what models cost, and timings; `python -m activemlp_jax.benchmark`.

Imports `training`, and all that it may import.
"""
