"""Models as StableHLO, ONNX or safetensors, with a model card; `python -m activemlp_jax.export`.

Imports `tasks`, `inference`, `weights`, `data`, `models` and `utils`.
"""
