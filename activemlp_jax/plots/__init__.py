"""Pictures: training curves, confusion matrices, label map overlays and pages of offsets.

Imports `inference`, `data` and `utils`.
"""
