"""PyTorch implementations of the models, as references; need the optional dependencies [torch].

Imports nothing else from `activemlp_jax`.
"""
