"""PyTorch files and weight names, inference of the model, model directories, conversion.

Imports `torch_reference`, `data`, `models` and `utils`.
"""
