"""Label maps as pictures: colors over the image, and a legend that names them."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.utils.errors import one_line

MIN_LONG_SIDE = 384  # pixels; smaller pictures are enlarged by a whole factor
LEGEND_ENTRIES = 24  # classes at most; the most frequent ones in an overlay
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
    """Color `labels` `[H, W]`: `[H, W, 3]` uint8; `IGNORED` is black unless it is a class."""
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


def _shortened(name: str) -> str:
    """Shorten a class name so that it fits on a line."""
    name = one_line(name)
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def _enlarged(picture: np.ndarray) -> Image.Image:
    height, width = picture.shape[:2]
    factor = max(1, -(-MIN_LONG_SIDE // max(height, width)))
    size = width * factor, height * factor
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)


def draw_overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], opacity: float = 0.6
) -> Image.Image:
    """Draw the colors of labels over an image, with a legend of the most frequent classes.

    Args:
      image: `[H, W, 3]` uint8.
      labels: class of each pixel, `[H, W]`.
      class_names: names by label.
      opacity: opacity of the colors, 0 to 1.
    """
    colors = class_colors(len(class_names))
    picture = _enlarged(blend(image, labels, colors, opacity))
    shares = class_shares(labels)
    listed = shares[:LEGEND_ENTRIES]
    lines = [f"{_shortened(class_names[label])}  {100 * share:.1f}%" for label, share in listed]
    if len(shares) > len(listed):
        lines.append(f"and {len(shares) - len(listed)} more")

    font, line_height = ImageFont.load_default(size=14), 20
    widths = [line_height + font.getlength(line) for line in lines]
    width = picture.width + int(max(*widths, font.getlength(LEGEND_HEADER))) + 3 * MARGIN
    height = max(picture.height, (1 + len(lines)) * line_height + 2 * MARGIN)
    page = Image.new("RGB", (width, height), "white")
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    left = picture.width + MARGIN
    draw.text((left, MARGIN), LEGEND_HEADER, fill="#5f6368", font=font)
    for number, line in enumerate(lines):
        top = MARGIN + (1 + number) * line_height
        if number < len(listed):
            box = (left, top + 2, left + line_height - 6, top + line_height - 4)
            draw.rectangle(box, fill=tuple(colors[listed[number][0]].tolist()), outline="black")
        draw.text((left + line_height, top), line, fill="black", font=font)
    return page


def draw_comparison(
    scenes: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str]
) -> Image.Image:
    """Draw a column per scene, with image, true labels and predicted labels, above a legend.

    Args:
      scenes: image `[H, W, 3]` uint8, true labels `[H, W]` and predicted labels `[H, W]` of each.
      class_names: names by label.
    """
    side, colors = 128, class_colors(len(class_names))
    columns = [
        (image, paint(true, colors), paint(predicted, colors)) for image, true, predicted in scenes
    ]
    row_names, font = ("image", "truth", "model"), ImageFont.load_default(size=13)
    left = MARGIN + max(int(font.getlength(name)) for name in row_names) + MARGIN
    present = np.unique(
        np.concatenate([labels.reshape(-1) for _, *maps in scenes for labels in maps])
    )
    entries = [int(label) for label in present if label != IGNORED][:LEGEND_ENTRIES]
    entry_names = [_shortened(class_names[label]) for label in entries]
    step = 30 + max((int(font.getlength(name)) for name in entry_names), default=0)
    width = left + max(len(columns) * (side + MARGIN), step)
    per_line = max(1, (width - left) // step)
    rows = -(-len(entries) // per_line)
    page = Image.new("RGB", (width, 3 * (side + MARGIN) + MARGIN + rows * 22), "white")
    draw = ImageDraw.Draw(page)
    for row, name in enumerate(row_names):
        top = MARGIN + row * (side + MARGIN)
        draw.text((MARGIN, top + side // 2 - 8), name, fill="black", font=font)
        for column, pictures in enumerate(columns):
            height, long = pictures[row].shape[0], max(pictures[row].shape[:2])
            size = side * pictures[row].shape[1] // long, side * height // long
            smooth = row == 0 and long > side
            resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            fitted = Image.fromarray(pictures[row]).resize(size, resampling)
            page.paste(fitted, (left + column * (side + MARGIN), top))
    for number, (label, name) in enumerate(zip(entries, entry_names, strict=True)):
        line, position = divmod(number, per_line)
        x, y = left + position * step, 3 * (side + MARGIN) + MARGIN + line * 22
        draw.rectangle((x, y + 2, x + 13, y + 15), fill=tuple(colors[label].tolist()))
        draw.text((x + 19, y), name, fill="black", font=font)
    return page
