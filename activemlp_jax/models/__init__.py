"""Linen modules: the network, the Active Token Mixer and segmentation heads; also their costs.

Imports `ops` and `utils`.
"""
