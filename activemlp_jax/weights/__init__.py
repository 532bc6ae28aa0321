"""Read and convert PyTorch weights, infer their model, and read and write model directories.

Imports `torch_reference`, `data`, `models` and `utils`.
"""
