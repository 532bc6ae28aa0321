"""The commands of the package, one a line.

Example:
  python -m activemlp_jax
"""

COMMANDS = {
    "predict": "name what photos show, or label their pixels",
    "evaluate": "accuracy or mIoU of a model on a data set",
    "embed": "write the features that a classifier sees in images to a file",
    "export": "write a model as StableHLO, ONNX or safetensors",
    "prepare_data": "make ArrayRecord files of a data set, for fast training",
    "benchmark": "count what models cost, time them and the loading of images",
    "compile_check": "compile a config's train step for devices that are not here",
}


def main() -> None:
    """The command line."""
    width = max(map(len, COMMANDS))
    for name, text in COMMANDS.items():
        print(f"python -m activemlp_jax.{name:<{width}}  {text}")
    print("Each has --help. In the project's folder are train.py and convert_torch_weights.py.")


if __name__ == "__main__":
    main()
