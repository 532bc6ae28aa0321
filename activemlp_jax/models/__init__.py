"""Linen modules: the network, the Active Token Mixer, segmentation heads; and their costs.

Imports `ops` and `utils`.
"""
