"""Cost counts and timings of models and data loading; `python -m activemlp_jax.benchmark`.

Imports `training` and everything that `training` may import.
"""
