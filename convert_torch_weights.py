"""Convert PyTorch weights of ActiveMLP to a model directory, or back; `--help` has examples."""

from activemlp_jax.weights.convert import main

if __name__ == "__main__":
    main()
