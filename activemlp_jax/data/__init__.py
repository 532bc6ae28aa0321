"""Datasets: sources, sampler, transforms, loader, and preparation of ArrayRecord files.

Imports `models` (for the smallest image side) and `utils`.
"""
