"""Linen modules: the network, the Active Token Mixer, heads, and what they cost.

Imports `ops` and `utils`.
"""
