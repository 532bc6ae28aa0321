"""Draw label maps as pictures: colors over the image, and a legend that names them."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.plots.pictures import shortened

MIN_LONG_SIDE = 384  # pixels; smaller pictures are enlarged by a whole factor
LEGEND_ENTRIES = 24  # classes at most; an overlay lists the most frequent ones
LEGEND_HEADER = "class, share of pixels"
MAX_NAME_LENGTH = 60  # characters
MARGIN = 8
FIRST_COLORS = (
    *((64, 64, 64), (230, 40, 40), (40, 170, 60), (50, 90, 235), (245, 205, 30), (235, 75, 215)),
    *((40, 205, 215), (245, 135, 30), (140, 60, 200), (165, 230, 60), (255, 170, 175)),
)
SHADES = ((0.85, 0.95), (0.5, 0.75), (0.9, 0.6))  # saturation and value of all further colors


def class_colors(count: int) -> np.ndarray:
    """Choose a color `[count, 3]` uint8 for each class; the first, often background, is gray."""
    colors = list(FIRST_COLORS)
    for label in range(len(colors), count):
        # Steps of the golden ratio spread any number of hues evenly over the color circle.
        hue, (saturation, value) = label * 0.6180339887 % 1, SHADES[label % len(SHADES)]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colors[:count], np.uint8)


def paint(labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Map `labels` `[H, W]` to uint8 `[H, W, 3]`; `IGNORED` is black unless it is a class."""
    table = np.zeros((max(len(colors), IGNORED + 1), 3), np.uint8)
    table[: len(colors)] = colors
    return table[labels]


def blend(image: np.ndarray, labels: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    """Blend the colors of `labels` `[H, W]` over `image` `[H, W, 3]` uint8; `opacity` 0 to 1."""
    mixed = (1 - opacity) * image + opacity * paint(labels, colors)
    return np.round(mixed).astype(np.uint8)


def class_shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """List the classes in `labels` `[H, W]` with their shares of the pixels, largest first."""
    shares = np.bincount(labels.reshape(-1)) / labels.size
    order = np.argsort(-shares, kind="stable")
    return [(int(label), float(shares[label])) for label in order if shares[label] > 0]


def label_picture(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Convert `labels` `[H, W]` to a picture of 8 bits per pixel, or 16 for more than 255 classes.

    With 8 bits, no class has the value 255, which means `IGNORED` in datasets.
    """
    return Image.fromarray(labels.astype(np.uint8 if num_classes <= IGNORED else np.uint16))


def draw_overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], opacity: float = 0.6
) -> Image.Image:
    """Draw the colors of labels over an image, with a legend of the most frequent classes.

    `image` is `[H, W, 3]` uint8, `labels` `[H, W]`, and `opacity` 0 to 1.
    """
    colors, shares = class_colors(len(class_names)), class_shares(labels)
    picture = Image.fromarray(blend(image, labels, colors, opacity))
    factor = max(1, -(-MIN_LONG_SIDE // max(picture.size)))
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    listed = shares[:LEGEND_ENTRIES]
    entries = [
        (f"{shortened(class_names[label], MAX_NAME_LENGTH)}  {100 * share:.1f}%", colors[label])
        for label, share in listed
    ]
    if len(shares) > len(listed):
        entries.append((f"and {len(shares) - len(listed)} more", None))
    return _with_legend(picture, [(LEGEND_HEADER, None), *entries])


def draw_comparison(
    scenes: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str]
) -> Image.Image:
    """Draw one column per scene, with its image, true labels and predicted labels, and a legend.

    A scene is its image `[H, W, 3]` uint8, true labels `[H, W]` and predicted labels `[H, W]`.
    """
    colors, side = class_colors(len(class_names)), 128
    left, step = 60, side + MARGIN
    page = Image.new("RGB", (left + len(scenes) * step, MARGIN + 3 * step), "white")
    for row, name in enumerate(("image", "truth", "model")):
        middle = MARGIN, MARGIN + row * step + side // 2
        ImageDraw.Draw(page).text(middle, name, fill="black", font=_font(), anchor="lm")
    for column, (image, true, predicted) in enumerate(scenes):
        for row, pixels in enumerate((image, paint(true, colors), paint(predicted, colors))):
            smooth = row == 0 and max(image.shape) > side
            resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            picture = ImageOps.contain(Image.fromarray(pixels), (side, side), resampling)
            page.paste(picture, (left + column * step, MARGIN + row * step))
    present = np.unique(np.concatenate([labels.ravel() for _, *maps in scenes for labels in maps]))
    listed = present[present != IGNORED][:LEGEND_ENTRIES]
    entries = [(shortened(class_names[label], MAX_NAME_LENGTH), colors[label]) for label in listed]
    return _with_legend(page, entries)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _with_legend(
    picture: Image.Image, entries: Sequence[tuple[str, np.ndarray | None]]
) -> Image.Image:
    """Add a legend to the right of `picture`; each entry is a text, and its color or None."""
    line, indent = 20, 20
    text_width = max((int(_font().getlength(text)) for text, _ in entries), default=0)
    size = (
        picture.width + indent + text_width + 3 * MARGIN,
        max(picture.height, len(entries) * line + 2 * MARGIN),
    )
    page = Image.new("RGB", size, "white")
    page.paste(picture)
    draw, left = ImageDraw.Draw(page), picture.width + MARGIN
    for number, (text, color) in enumerate(entries):
        top = MARGIN + number * line
        if color is not None:
            box = (left, top + 2, left + 14, top + 16)
            draw.rectangle(box, fill=tuple(color.tolist()), outline="black")
        draw.text((left + indent, top), text, fill="black", font=_font())
    return page
