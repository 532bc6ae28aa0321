"""Export of models to StableHLO, ONNX or safetensors, with a model card.

Imports `tasks`, `inference`, `weights`, `data`, `models` and `utils`.
"""
