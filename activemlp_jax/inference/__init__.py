"""Classify, segment and embed images given in memory or as files; inspect offsets.

Imports `distributed`, `weights`, `data`, `models` and `utils`.
"""
