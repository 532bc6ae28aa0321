"""Tasks: the inputs, loss, evaluation and metrics of classification and segmentation.

Imports `plots`, `inference`, `distributed`, `data`, `weights`, `models` and `utils`.
"""
