"""What differs between classification and segmentation: inputs, loss, evaluation, metrics.

Imports `plots`, `inference`, `distributed`, `data`, `weights`, `models` and `utils`.
"""
