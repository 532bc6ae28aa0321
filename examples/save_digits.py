"""Save handwritten test digits, which the demo does not train on, as pictures.

    python examples/save_digits.py digits

Writes `digits/0.png` to `digits/9.png`, one picture of 32 x 32 pixels per digit, for the model that
`make demo` trains. docs/first_steps.md uses them.
"""

import argparse
from pathlib import Path

from PIL import Image

from activemlp_jax.data.sources import open_source


def main() -> None:
    """Save one digit of each class in the given folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to write into")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source("digits", "test")
    digits: dict[str, Image.Image] = {}  # the first of each class
    for index in range(len(source)):
        image, label = source[index]
        digits.setdefault(source.class_names[label], Image.fromarray(image))
    for name, digit in digits.items():
        digit.save(folder / f"{name}.png")
    first, *_, last = sorted(digits)
    print(f"wrote {folder}/{first}.png to {folder}/{last}.png, {len(digits)} images")


if __name__ == "__main__":
    main()
