"""Draw a dataset of letters that resembles the handwritten digits.

    python examples/draw_letters.py data/letters

Draws the letters A to Z in the fonts that come with matplotlib, each slightly slanted, stretched
and rotated, as pictures of 32 x 32 pixels in class folders: `train/A/*.png` to `train/Z/*.png`, and
the same in `val` with other fonts. Like the digits of scikit-learn, a letter fills its picture and
has 8 x 8 gray values. From letters, a model learns strokes and corners that help it to read digits;
see docs/fine_tuning.md.
"""

import argparse
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
COARSE = 8  # gray values per side
DRAWINGS = 8  # per letter and font
VAL_FONTS = ("DejaVuSans-Oblique", "STIXGeneralBol", "cmr10")


def fonts() -> list[Path]:
    """List the files of matplotlib's fonts with ordinary letters, sorted."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVuS", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmtt10")
    return sorted(
        path
        for path in folder.glob("*.ttf")
        if path.stem.startswith(families) and "Display" not in path.stem
    )


def draw(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """Draw a letter in white on black with random slant, rotation and margins."""
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
    """Draw all letters into the given folder."""
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
            class_folder = folder / split / letter
            class_folder.mkdir(parents=True, exist_ok=True)
            for number in range(DRAWINGS):
                draw(letter, font, rng).save(class_folder / f"{font.stem}-{number}.png")
                count += 1
    print(f"drew {count} letters in {len(fonts())} fonts under {folder}")


if __name__ == "__main__":
    main()
