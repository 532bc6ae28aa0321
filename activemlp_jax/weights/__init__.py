"""PyTorch files and weight names, inferring a model from them, model directories, conversion.

Imports `torch_reference`, `data`, `models` and `utils`.
"""
