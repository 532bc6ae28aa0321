"""Draw a small segmentation dataset, as a stand-in for your own photos and masks.

    python examples/draw_shapes.py data/shapes

Draws discs, squares and triangles of any color on noise, 96 x 80 pixels, in the layout that
`--config.data.name=folder:data/shapes` reads: `classes.txt`, `images/train/*.png`,
`annotations/train/*.png`, and the same for `val`. docs/segmentation.md trains on them.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 80
CLASSES = ("background", "disc", "square", "triangle")  # a mask has indices into this tuple
IMAGES = {"train": 240, "val": 40}


def draw(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw an image and its mask, which has a class index of 8 bits per pixel."""
    image = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    mask = Image.new("L", (WIDTH, HEIGHT))
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        x, y = rng.uniform((0, 0), (WIDTH, HEIGHT))
        radius = rng.uniform(9, 20)
        color = tuple(rng.integers(0, 256, 3).tolist())
        for page, fill in ((image, color), (mask, label)):
            pen = ImageDraw.Draw(page)
            if label == 1:
                pen.circle((x, y), radius, fill)
            else:
                pen.regular_polygon((x, y, radius), n_sides=6 - label, fill=fill)
    return image, mask


def main() -> None:
    """Draw the dataset into the given folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to write into")
    folder = parser.parse_args().folder
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = draw(rng)
            image.save(folder / "images" / split / f"{number:03}.png")
            mask.save(folder / "annotations" / split / f"{number:03}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    print(f"drew {sum(IMAGES.values())} images of {len(CLASSES)} classes under {folder}")


if __name__ == "__main__":
    main()
