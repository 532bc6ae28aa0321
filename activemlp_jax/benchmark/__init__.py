"""Cost counts and timings of models and data loading; `python -m activemlp_jax.benchmark`.

Imports `training`, and all that it may import.
"""
