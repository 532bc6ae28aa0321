"""Convert PyTorch weights of ActiveMLP to a model directory, or a model directory to PyTorch.

Examples:
  python convert_torch_weights.py activemlp_tiny.pth models/active_tiny --verify
  python convert_torch_weights.py models/active_tiny back.pth --to-torch
"""

from activemlp_jax.weights.convert import main

if __name__ == "__main__":
    main()
