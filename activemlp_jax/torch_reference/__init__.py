"""PyTorch reference implementations of the flax models; need the extra `torch`.

Imports nothing else from `activemlp_jax`.
"""
