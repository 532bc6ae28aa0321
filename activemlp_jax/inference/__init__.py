"""Classify, segment and embed images, inspect offsets; images as users have them.

Imports `distributed`, `weights`, `data`, `models` and `utils`.
"""
