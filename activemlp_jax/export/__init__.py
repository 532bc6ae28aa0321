"""Models as StableHLO, ONNX or safetensors, with a model card; `python -m activemlp_jax.export`.

Imports `inference`, `weights`, `data`, `models` and `utils`.
"""
