"""List the commands of the package.

Example:
  python -m activemlp_jax
"""

COMMANDS = {
    "predict": "classify photos, or label their pixels",
    "evaluate": "measure the accuracy or mIoU of a model on a dataset",
    "embed": "write the features that a classifier computes from images to a file",
    "export": "write a model as StableHLO, ONNX or safetensors",
    "prepare_data": "convert a dataset to ArrayRecord files, for fast training",
    "benchmark": "count the cost of models, and time models and image loading",
    "compile_check": "compile a config's train step for devices that this machine lacks",
}


def main() -> None:
    """Print every command with a one-line description."""
    width = max(map(len, COMMANDS))
    for name, text in COMMANDS.items():
        print(f"python -m activemlp_jax.{name:<{width}}  {text}")
    print("Each has --help. The project's folder also has train.py and convert_torch_weights.py.")


if __name__ == "__main__":
    main()
