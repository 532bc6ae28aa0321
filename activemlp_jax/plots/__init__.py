"""Pictures: training curves, confusion matrix, overlays of label maps, pages of offsets.

Imports `inference`, `data` and `utils`.
"""
