"""Draw a data set of letters in the form of the handwritten digits.

    python examples/draw_letters.py data/letters

The letters A to Z in the fonts that come with matplotlib, each a little slanted, stretched and
turned, as pictures of 32 x 32 pixels in class folders: `train/A/*.png` to `train/Z/*.png`, and
`val`, whose fonts are not among those of `train`. Like the digits of scikit-learn they fill their
picture and hold 8 x 8 grey values. A model learns strokes and corners from them that help it to
read digits: see docs/fine_tuning.md.
"""

import argparse
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
COARSE = 8  # grey values a side
DRAWINGS = 8  # of each letter in each font
VAL_FONTS = ("DejaVuSans-Oblique", "STIXGeneralBol", "cmr10")


def fonts() -> list[Path]:
    """The files of the fonts that have ordinary letters, sorted."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVuS", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmtt10")
    return sorted(
        path
        for path in folder.glob("*.ttf")
        if path.stem.startswith(families) and "Display" not in path.stem
    )


def draw(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """One letter, white on black, by random turn, slant and margins its own."""
    side = 6 * SIDE
    page = Image.new("L", (side, side))
    face = ImageFont.truetype(str(font), side // 2)
    ImageDraw.Draw(page).text((side / 2, side / 2), letter, 255, face, anchor="mm")
    slant = rng.uniform(-0.3, 0.3)
    page = page.transform(page.size, Image.Transform.AFFINE, (1, slant, -slant * side / 2, 0, 1, 0))
    page = page.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    left, upper, right, lower = page.getbbox() or (0, 0, side, side)
    margins = rng.uniform(0, 0.2, 4) * (right - left, lower - upper, right - left, lower - upper)
    box = tuple(np.array([left, upper, right, lower]) + margins * (-1, -1, 1, 1))
    coarse = page.resize((COARSE, COARSE), Image.Resampling.BOX, box)
    return coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to write into")
    folder = parser.parse_args().folder
    rng = np.random.default_rng(0)
    count = 0
    for font in fonts():
        split = "val" if font.stem in VAL_FONTS else "train"
        for letter in string.ascii_uppercase:
            place = folder / split / letter
            place.mkdir(parents=True, exist_ok=True)
            for number in range(DRAWINGS):
                draw(letter, font, rng).save(place / f"{font.stem}-{number}.png")
                count += 1
    print(f"drew {count} letters in {len(fonts())} fonts under {folder}")


if __name__ == "__main__":
    main()
