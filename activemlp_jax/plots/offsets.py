"""Page that shows where the Active Token Mixer looks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from activemlp_jax.inference.offsets import BlockOffsets, group_weights, mean_reach
from activemlp_jax.inference.tiling import logits_side
from activemlp_jax.utils.errors import UserError

Color = tuple[int, int, int]
Point = tuple[float, float]

DEFAULT_TOKENS: tuple[Point, ...] = ((0.2, 0.3), (0.5, 0.75), (0.8, 0.5))
COLORS = {"row": (226, 88, 0), "column": (16, 90, 220), "own": (255, 255, 255)}
INK, FAINT = (32, 33, 36), (95, 99, 104)

WIDTH, MARGIN = 1100, 24
PANEL = 384  # longer side of a picture
BAND = 21  # white border of the picture with dots, for reads outside the map
GAP = 42  # between rows
TEXT_WIDTH, TEXT_HEIGHT = WIDTH - 2 * PANEL - 4 * MARGIN, 320  # of a stage's statistics
FONT_SIZE, LINE_HEIGHT = 16, 22
SUPERSAMPLING = 3  # dots are drawn at this scale and then reduced, for smooth edges
DOT_RADIUS = 9.0  # of a dot with a mixing weight of 1, in pixels of the page
HEAT_OPACITY = 0.75
COLORMAP = "inferno"

TITLE = "Where the Active Token Mixer looks"
EXPLANATION = (
    "The model sees the picture as a grid of tokens, coarser from stage to stage. A token mixes "
    "what it reads in its row, what it reads in its column, and itself. Where it reads depends on "
    "the picture, and every group of channels has a place of its own: a dot, larger the more it "
    "counts."
)
SHARE_LABELS_X = 0, 74, 168
# Marks and their meaning. A mark is a key of `COLORS`, and whether it lies outside the map.
LEGEND: tuple[tuple[tuple[tuple[str, bool], ...], str], ...] = (
    ((("own", False),), "the token itself"),
    ((("row", False),), "read in its row"),
    ((("column", False),), "read in its column"),
    ((("row", True), ("column", True)), "outside the map: reads zero"),
)
HEADINGS = ("Where the marked tokens read", "Mean reach in row and column, by token")


class Stage(NamedTuple):
    """Blocks in a row of the page: dots show `dot_block`, map and statistics average `blocks`."""

    dot_block: BlockOffsets
    blocks: list[BlockOffsets]


class Reads(NamedTuple):
    """Positions that the groups of a block read for one token, in fractions of the picture.

    `positions` `[2, G, 2]` are (x, y), first in the token's row, then in its column. `own` is the
    position of the token. `weights` `[G, 3]` come from `group_weights`. `outside` `[G, 2]` tells
    for row and column whether the position lies outside the map, where zero is read.
    """

    positions: np.ndarray
    own: np.ndarray
    weights: np.ndarray
    outside: np.ndarray


class Statistics(NamedTuple):
    """Means over the tokens and blocks of a stage.

    `reach` is the distance at which a token reads in its row and in its column, in pixels of the
    input; groups are weighted by their mixing weights. `shares` are the mixing weights of
    (w, h, own). `outside` is the share of reads, in rows and columns, that lie outside the map.
    """

    reach: tuple[float, float]
    shares: tuple[float, float, float]
    outside: float


def stage_statistics(blocks: Sequence[BlockOffsets]) -> Statistics:
    """Compute the statistics of the first image over `blocks`, which belong to one stage."""
    weights = np.stack([group_weights(block)[0] for block in blocks])
    offsets = [(block.offset_w[:1], block.offset_h[:1]) for block in blocks]
    distance = np.array([[np.abs(o).mean((0, 1, 2)) for o in pair] for pair in offsets])
    read_weights = weights[..., :2].swapaxes(1, 2)  # [blocks, 2, G], like `distance`
    reach = blocks[0].stride * (read_weights * distance).sum((0, 2)) / read_weights.sum((0, 2))
    outside = [
        is_outside(pair[0], 2).mean() / 2 + is_outside(pair[1], 1).mean() / 2 for pair in offsets
    ]
    w, h, own = weights.mean((0, 1))
    return Statistics(
        (float(reach[0]), float(reach[1])),
        (float(w), float(h), float(own)),
        float(np.mean(outside)),
    )


def token_at(token: Point, height: int, width: int) -> tuple[int, int]:
    """Find the (row, column) of the token at `token` (x, y), in fractions of the picture."""
    x, y = token
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


def is_outside(offset: np.ndarray, axis: int) -> np.ndarray:
    """Find where `offset` `[B, H, W, G]` along `axis` 1 or 2 leaves the map, so zero is read."""
    shape = [1, 1, 1, 1]
    shape[axis] = length = offset.shape[axis]
    position = offset + np.arange(length).reshape(shape)
    return (position <= -1) | (position >= length)


def token_reads(block: BlockOffsets, row: int, column: int) -> Reads:
    """Compute where the token at (`row`, `column`) of the first image reads."""
    _, height, width, groups = block.offset_w.shape
    own = np.array([(column + 0.5) / width, (row + 0.5) / height])
    positions = np.tile(own, (2, groups, 1))
    positions[0, :, 0] += block.offset_w[0, row, column] / width
    positions[1, :, 1] += block.offset_h[0, row, column] / height
    outside = [
        is_outside(offset, axis)[0, row, column]
        for offset, axis in ((block.offset_w, 2), (block.offset_h, 1))
    ]
    return Reads(positions, own, group_weights(block)[0], np.stack(outside, -1))


def draw_offsets(
    image: Image.Image | np.ndarray,
    blocks: Sequence[BlockOffsets],
    tokens: Sequence[Point] | None = None,
) -> Image.Image:
    """Draw a page with one row per stage: where some tokens read, how far all read, and statistics.

    Args:
      image: `[H, W, 3]` uint8, or a PIL image, as the model saw it;
        `activemlp_jax.inference.offsets.show_to_model` prepares a photo in this way.
      blocks: result of `inspect_offsets` for this one image.
      tokens: positions of the tokens to show, each (x, y) in fractions of the picture from its top
        left; None shows three that are well apart.

    Returns:
      An RGB image, 1100 pixels wide; its height depends on the number of stages. Dots show the last
      block of the stage that computes offsets of its own. The map and the statistics are means over
      the stage's blocks, and the map also over row and column. Distances are in pixels of `image`.

    Raises:
      UserError: if a token lies outside the picture, the blocks belong to another image or to
        several, or offsets are not finite.
    """
    tokens = check_tokens(DEFAULT_TOKENS if tokens is None else tokens)
    photo = _as_picture(image)
    stages = _by_stage(blocks, photo)
    panel = _fit_to_panel(photo)
    header = _header()
    row_height = max(panel.height, TEXT_HEIGHT) + GAP
    page = Image.new("RGB", (WIDTH, header.height + len(stages) * row_height), "white")
    page.paste(header, (0, 0))
    for number, stage in enumerate(stages):
        y = header.height + number * row_height
        reach = np.mean([mean_reach(block)[0] for block in stage.blocks], axis=0)
        page.paste(draw_reads(panel, stage.dot_block, tokens), (MARGIN - BAND, y - BAND))
        page.paste(draw_reach(panel, reach), (2 * MARGIN + PANEL, y))
        page.paste(_draw_statistics(stage, reach), (3 * MARGIN + 2 * PANEL, y))
    return page


def check_tokens(tokens: Sequence[Point]) -> list[Point]:
    """Return the tokens as pairs of floats; raise UserError if one is outside the picture."""
    checked = []
    for token in tokens:
        position = np.asarray(token, np.float64)
        if position.shape != (2,) or not ((position >= 0) & (position <= 1)).all():
            raise UserError(
                f"token {token} is not a place in the picture, expected x and y from 0 to 1"
            )
        checked.append((float(position[0]), float(position[1])))
    return checked


def draw_reads(panel: Image.Image, block: BlockOffsets, tokens: Sequence[Point]) -> Image.Image:
    """Draw where `block` reads for `tokens`, as dots on `panel` in light grays.

    A white border, `BAND` pixels wide, holds the reads outside the map.
    """
    _, height, width, _ = block.offset_w.shape
    page = Image.new("RGB", (panel.width + 2 * BAND, panel.height + 2 * BAND), "white")
    page.paste(_pale(panel), (BAND, BAND))
    page = page.resize(
        (page.width * SUPERSAMPLING, page.height * SUPERSAMPLING), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(page, "RGBA")
    start, side = BAND * SUPERSAMPLING, np.array(panel.size) * SUPERSAMPLING
    distinct = dict.fromkeys(token_at(token, height, width) for token in tokens)
    reads = [token_reads(block, row, column) for row, column in distinct]
    for read in reads:
        x, y = start + read.own * side
        draw.line((start, y, start + side[0], y), fill=(*INK, 70), width=SUPERSAMPLING)
        draw.line((x, start, x, start + side[1]), fill=(*INK, 70), width=SUPERSAMPLING)
    for read in reads:
        for number, source in enumerate(("row", "column")):
            weights, outside = read.weights[:, number], read.outside[:, number]
            points = zip(read.positions[number], weights, outside, strict=True)
            for position, weight, is_out in points:
                beyond = 10 * SUPERSAMPLING if is_out else 0
                center = start + np.clip(position * side, -beyond, side + beyond)
                _dot(draw, center, weight, COLORS[source], bool(is_out))
    for read in reads:
        _square(draw, start + read.own * side, read.weights[:, 2].mean())
    return page.resize(
        (page.width // SUPERSAMPLING, page.height // SUPERSAMPLING), Image.Resampling.BOX
    )


def draw_reach(panel: Image.Image, reach: np.ndarray) -> Image.Image:
    """Draw `reach` `[H, W]`, in pixels, over `panel`; the color map spans its range."""
    heat = Image.fromarray(_heat_colors(_min_max_scaled(reach)))
    return Image.blend(
        _pale(panel), heat.resize(panel.size, Image.Resampling.NEAREST), HEAT_OPACITY
    )


def _pale(panel: Image.Image) -> Image.Image:
    """Convert `panel` to light grays, on which colors stand out."""
    white = Image.new("RGB", panel.size, "white")
    return Image.blend(panel.convert("L").convert("RGB"), white, 0.4)


def _min_max_scaled(values: np.ndarray) -> np.ndarray:
    """Scale `values` linearly to the range 0 to 1; equal values become 0.5."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)


def _heat_colors(values: np.ndarray) -> np.ndarray:
    """Map `values` from 0 to 1 to colors `[..., 3]` uint8."""
    import matplotlib  # slow to import

    return matplotlib.colormaps[COLORMAP](values, bytes=True)[..., :3]


def _dot(
    draw: ImageDraw.ImageDraw, center: Sequence[float], weight: float, color: Color, outside: bool
) -> None:
    """Draw a dot whose area and opacity grow with `weight`, or a ring if `outside`."""
    radius = SUPERSAMPLING * DOT_RADIUS * math.sqrt(weight)
    box = tuple(side + sign * radius for sign in (-1, 1) for side in center)
    if outside:
        draw.ellipse(box, outline=(*color, 200), width=SUPERSAMPLING)
    else:
        draw.ellipse(box, fill=(*color, round(90 + 165 * weight)), outline=(255, 255, 255, 150))


def _square(draw: ImageDraw.ImageDraw, center: Sequence[float], weight: float) -> None:
    """Draw the mark of a token, with the area of a dot of this `weight`."""
    half = SUPERSAMPLING * DOT_RADIUS * math.sqrt(weight * math.pi) / 2
    (x, y), edge = center, 2 * SUPERSAMPLING
    draw.rectangle(
        (x - half - edge, y - half - edge, x + half + edge, y + half + edge), fill=(*INK, 255)
    )
    draw.rectangle((x - half, y - half, x + half, y + half), fill=(*COLORS["own"], 255))


def _as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"the image is {pixels.dtype} of shape {pixels.shape}, expected a PIL image or uint8 "
            "of shape [H, W, 3]"
        )
    return Image.fromarray(pixels)


def _fit_to_panel(photo: Image.Image) -> Image.Image:
    """Resize `photo` to a longer side of `PANEL`; pixels of small photos stay sharp squares."""
    factor = PANEL / max(photo.size)
    size = tuple(max(1, round(side * factor)) for side in photo.size)
    resampling = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return photo.resize((size[0], size[1]), resampling)


def _by_stage(blocks: Sequence[BlockOffsets], photo: Image.Image) -> list[Stage]:
    """Group the blocks by stage; raise UserError if they are not finite or not of this image."""
    if not blocks:
        raise UserError("there are no blocks to draw, expected those of inspect_offsets")
    for block in blocks:
        images, height, width, _ = block.offset_w.shape
        if images != 1:
            raise UserError(f"the blocks are of {images} images, expected those of one")
        tokens = logits_side(photo.height), logits_side(photo.width)
        if block.stage == 0 and tokens != (height, width):
            raise UserError(
                f"the image has {photo.width} x {photo.height} pixels, but stage 0 has "
                f"{width} x {height} tokens of {block.stride} pixels: expected the image as the "
                "model saw it"
            )
        if not (np.isfinite(block.offset_w).all() and np.isfinite(block.offset_h).all()):
            raise UserError(
                f"block {block.block} of stage {block.stage} has offsets that are not finite"
            )
    stages = []
    for number in sorted({block.stage for block in blocks}):
        in_stage = [block for block in blocks if block.stage == number]
        dot_block = in_stage[0]
        for block in in_stage[1:]:
            pairs = (block.offset_w, dot_block.offset_w), (block.offset_h, dot_block.offset_h)
            if not all(np.array_equal(*pair) for pair in pairs):
                dot_block = block
        stages.append(Stage(dot_block, in_stage))
    return stages


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _header() -> Image.Image:
    """Draw the title, the explanation, the legend and the headings of the columns."""
    lines = _wrapped(EXPLANATION, WIDTH - 2 * MARGIN, FONT_SIZE)
    legend_y = 58 + len(lines) * LINE_HEIGHT + 12
    page = Image.new("RGB", (WIDTH, legend_y + 90), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 14), TITLE, fill=INK, font=_font(26))
    for number, line in enumerate(lines):
        draw.text((MARGIN, 58 + number * LINE_HEIGHT), line, fill=INK, font=_font(FONT_SIZE))
    x = MARGIN
    for marks, text in LEGEND:
        for kind, outside in marks:
            page.paste(_mark(kind, outside), (x, legend_y))
            x += 20
        draw.text((x + 6, legend_y), text, fill=INK, font=_font(FONT_SIZE))
        x += 6 + round(_font(FONT_SIZE).getlength(text)) + 32
    for column, text in enumerate(HEADINGS):
        corner = MARGIN + column * (PANEL + MARGIN), legend_y + 46
        draw.text(corner, text, fill=INK, font=_font(18))
    return page


def _mark(kind: str, outside: bool = False) -> Image.Image:
    """Draw a mark of the legend, 20 by 20 pixels."""
    page = Image.new("RGB", (20 * SUPERSAMPLING, 20 * SUPERSAMPLING), "white")
    draw, center = ImageDraw.Draw(page, "RGBA"), (10 * SUPERSAMPLING, 10 * SUPERSAMPLING)
    if kind == "own":
        _square(draw, center, 0.6)
    else:
        _dot(draw, center, 0.6, COLORS[kind], outside)
    return page.resize((20, 20), Image.Resampling.BOX)


def _draw_statistics(stage: Stage, reach: np.ndarray) -> Image.Image:
    """Draw the statistics of a stage, `TEXT_WIDTH` by `TEXT_HEIGHT` pixels."""
    page = Image.new("RGB", (TEXT_WIDTH, TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    dot_block = stage.dot_block
    _, height, width, _ = dot_block.offset_w.shape
    statistics = stage_statistics(stage.blocks)

    def write(y: int, text: str, size: int = FONT_SIZE - 1, color: Color = INK, x: int = 0) -> None:
        draw.text((x, y), text, fill=color, font=_font(size))

    write(-4, f"Stage {dot_block.stage}", 22)
    write(28, f"{width} by {height} tokens, {dot_block.stride} pixels apart", color=FAINT)
    write(48, f"{len(stage.blocks)} blocks; dots: block {dot_block.block}", color=FAINT)

    write(80, "Mean reach", FONT_SIZE + 1)
    for number, source in enumerate(("row", "column")):
        y = 104 + number * LINE_HEIGHT
        page.paste(_mark(source), (0, y - 1))
        write(y, f"{source} {statistics.reach[number]:.1f} pixels", x=26)

    write(158, "Share in the mix", FONT_SIZE + 1)
    left = 0.0
    for number, (source, share) in enumerate(zip(COLORS, statistics.shares, strict=True)):
        right = left + share * (TEXT_WIDTH - 1)
        draw.rectangle((left, 184, right, 199), fill=COLORS[source], outline=INK)
        write(203, f"{source} {100 * share:.0f}%", FONT_SIZE - 2, x=SHARE_LABELS_X[number])
        left = right
    write(223, f"{100 * statistics.outside:.0f}% of the reads are outside", color=FAINT)

    write(255, "Colors of the map", FONT_SIZE + 1)
    gray = Image.new("RGB", (TEXT_WIDTH, 16), "gray")
    scale = np.linspace(reach.min(), reach.max(), TEXT_WIDTH)
    page.paste(draw_reach(gray, scale[None]), (0, 281))
    maximum = f"{reach.max():.1f} pixels"
    if reach.max() > reach.min():
        write(300, f"{reach.min():.1f}")
    write(300, maximum, x=TEXT_WIDTH - math.ceil(_font(FONT_SIZE - 1).getlength(maximum)))
    return page
