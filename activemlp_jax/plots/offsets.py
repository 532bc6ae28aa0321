"""Where the Active Token Mixer looks, as a page for people."""

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

TOKENS: tuple[Point, ...] = ((0.2, 0.3), (0.5, 0.75), (0.8, 0.5))
COLORS = {"row": (226, 88, 0), "column": (16, 90, 220), "own": (255, 255, 255)}
INK, FAINT = (32, 33, 36), (95, 99, 104)

WIDTH, MARGIN = 1100, 24
PANEL = 384  # the longer side of a picture
BAND = 21  # around a picture with dots, for those outside the map
GAP = 42  # between rows
TEXT, TEXT_HEIGHT = WIDTH - 2 * PANEL - 4 * MARGIN, 320  # of a stage's figures
SIZE, LINE = 16, 22  # of letters and lines
FINER = 3  # dots are drawn so much larger and made smaller, for smooth edges
RADIUS = 9.0  # of a dot that had all weight, in pixels of the page
HEAT = 0.75  # opacity of the heat map
COLORMAP = "inferno"

TITLE = "Where the Active Token Mixer looks"
EXPLANATION = (
    "The model sees the picture as a grid of tokens, coarser from stage to stage. A token mixes "
    "what it reads in its row, what it reads in its column, and itself. Where it reads depends on "
    "the picture, and every group of channels has a place of its own: a dot, larger the more it "
    "counts."
)
SHARES_AT = 0, 74, 168  # where they are written
# Marks, by what they are of and whether it is outside the map; and what they mean.
LEGEND: tuple[tuple[tuple[tuple[str, bool], ...], str], ...] = (
    ((("own", False),), "the token itself"),
    ((("row", False),), "read in its row"),
    ((("column", False),), "read in its column"),
    ((("row", True), ("column", True)), "outside the map: reads zero"),
)
HEADINGS = ("Where the marked tokens read", "Mean reach in row and column, by token")


class Stage(NamedTuple):
    """What a row of the page shows: `shown` has the dots, all `blocks` the map and the figures."""

    shown: BlockOffsets
    blocks: list[BlockOffsets]


class Reads(NamedTuple):
    """Where the groups of a block read for one token, as fractions of the picture.

    `places` `[2, G, 2]` are (x, y) in the token's row, then in its column; `own` is the token's.
    `weights` `[G, 3]` are those of `group_weights`. `outside` `[G, 2]` says for row and column
    which places read zero, as they are outside the map.
    """

    places: np.ndarray
    own: np.ndarray
    weights: np.ndarray
    outside: np.ndarray


class Figures(NamedTuple):
    """Means over the tokens and blocks of a stage.

    `reach` is how far away in its row and in its column a token reads, in pixels of the input;
    groups count by their mixing weights. `shares` are the mixing weights of (w, h, own), and
    `outside` is the share of places, in rows and columns, that are outside the map.
    """

    reach: tuple[float, float]
    shares: tuple[float, float, float]
    outside: float


def figures(blocks: Sequence[BlockOffsets]) -> Figures:
    """What the page says of the first image in numbers; `blocks` are of one stage."""
    weights = np.stack([group_weights(block)[0] for block in blocks])
    offsets = [(block.offset_w[:1], block.offset_h[:1]) for block in blocks]
    distance = np.array([[np.abs(o).mean((0, 1, 2)) for o in pair] for pair in offsets])
    of_source = weights[..., :2].swapaxes(1, 2)  # [blocks, 2, G], as `distance` is
    reach = blocks[0].stride * (of_source * distance).sum((0, 2)) / of_source.sum((0, 2))
    outside = [
        is_outside(pair[0], 2).mean() / 2 + is_outside(pair[1], 1).mean() / 2 for pair in offsets
    ]
    w, h, own = weights.mean((0, 1))
    return Figures(
        (float(reach[0]), float(reach[1])),
        (float(w), float(h), float(own)),
        float(np.mean(outside)),
    )


def token_at(token: Point, height: int, width: int) -> tuple[int, int]:
    """The (row, column) of the token at (x, y), in fractions of the picture."""
    x, y = token
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


def is_outside(offset: np.ndarray, axis: int) -> np.ndarray:
    """Where `offset` `[B, H, W, G]` along `axis` 1 or 2 leads out of the map, and zero is read."""
    shape = [1, 1, 1, 1]
    shape[axis] = length = offset.shape[axis]
    place = offset + np.arange(length).reshape(shape)
    return (place <= -1) | (place >= length)


def token_reads(block: BlockOffsets, row: int, column: int) -> Reads:
    """Where the token at (`row`, `column`) of the first image reads."""
    _, height, width, groups = block.offset_w.shape
    own = np.array([(column + 0.5) / width, (row + 0.5) / height])
    places = np.tile(own, (2, groups, 1))
    places[0, :, 0] += block.offset_w[0, row, column] / width
    places[1, :, 1] += block.offset_h[0, row, column] / height
    outside = [
        is_outside(offset, axis)[0, row, column]
        for offset, axis in ((block.offset_w, 2), (block.offset_h, 1))
    ]
    return Reads(places, own, group_weights(block)[0], np.stack(outside, -1))


def draw_offsets(
    image: Image.Image | np.ndarray,
    blocks: Sequence[BlockOffsets],
    tokens: Sequence[Point] | None = None,
) -> Image.Image:
    """A page with a row for each stage: where tokens read, how far all of them do, and figures.

    Args:
      image: `[H, W, 3]` uint8, or a PIL image, as the model saw it:
        `activemlp_jax.inference.offsets.show_to_model` gives it of a photo.
      blocks: what `inspect_offsets` found of this one image.
      tokens: the places to show, each (x, y) in fractions of the picture from its top left; None
        for three that are well apart.

    Returns:
      An RGB image, 1100 pixels wide and as high as its stages need. Dots are of the last block of
      the stage that makes offsets; the map and the figures are means over the stage's blocks, the
      map's over row and column as well, with distances in pixels of `image`.

    Raises:
      UserError: a token outside the picture, an image that the blocks are not of, blocks of many
        images, or offsets that are not finite.
    """
    tokens = check_tokens(TOKENS if tokens is None else tokens)
    photo = _as_picture(image)
    stages = _by_stage(blocks, photo)
    panel = _fitted(photo)
    header = _header()
    row_height = max(panel.height, TEXT_HEIGHT) + GAP
    page = Image.new("RGB", (WIDTH, header.height + len(stages) * row_height), "white")
    page.paste(header, (0, 0))
    for number, stage in enumerate(stages):
        y = header.height + number * row_height
        reach = np.mean([mean_reach(block)[0] for block in stage.blocks], axis=0)
        page.paste(draw_reads(panel, stage.shown, tokens), (MARGIN - BAND, y - BAND))
        page.paste(draw_reach(panel, reach), (2 * MARGIN + PANEL, y))
        page.paste(_figures(stage, reach), (3 * MARGIN + 2 * PANEL, y))
    return page


def check_tokens(tokens: Sequence[Point]) -> list[Point]:
    """The tokens as pairs of floats; UserError if one is no place of the picture."""
    checked = []
    for token in tokens:
        place = np.asarray(token, np.float64)
        if place.shape != (2,) or not ((place >= 0) & (place <= 1)).all():
            raise UserError(
                f"token {token} is no place in the picture, expected x and y from 0 to 1"
            )
        checked.append((float(place[0]), float(place[1])))
    return checked


def draw_reads(panel: Image.Image, block: BlockOffsets, tokens: Sequence[Point]) -> Image.Image:
    """The places that `block` reads for `tokens` as dots on `panel`, made grey and light.

    Around it is a white band, `BAND` pixels wide, for the places outside the map.
    """
    _, height, width, _ = block.offset_w.shape
    page = Image.new("RGB", (panel.width + 2 * BAND, panel.height + 2 * BAND), "white")
    page.paste(_pale(panel), (BAND, BAND))
    page = page.resize((page.width * FINER, page.height * FINER), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(page, "RGBA")
    start, side = BAND * FINER, np.array(panel.size) * FINER
    spots = dict.fromkeys(token_at(token, height, width) for token in tokens)
    reads = [token_reads(block, row, column) for row, column in spots]
    for read in reads:
        x, y = start + read.own * side
        draw.line((start, y, start + side[0], y), fill=(*INK, 70), width=FINER)
        draw.line((x, start, x, start + side[1]), fill=(*INK, 70), width=FINER)
    for read in reads:
        for number, source in enumerate(("row", "column")):
            weights, outside = read.weights[:, number], read.outside[:, number]
            for place, weight, is_out in zip(read.places[number], weights, outside, strict=True):
                beyond = 10 * FINER if is_out else 0
                center = start + np.clip(place * side, -beyond, side + beyond)
                _dot(draw, center, weight, COLORS[source], bool(is_out))
    for read in reads:
        _square(draw, start + read.own * side, read.weights[:, 2].mean())
    return page.resize((page.width // FINER, page.height // FINER), Image.Resampling.BOX)


def draw_reach(panel: Image.Image, reach: np.ndarray) -> Image.Image:
    """`reach` `[H, W]`, in pixels, as colours from its least to its most over `panel`."""
    heat = Image.fromarray(_heat_colors(_stretched(reach)))
    return Image.blend(_pale(panel), heat.resize(panel.size, Image.Resampling.NEAREST), HEAT)


def _pale(panel: Image.Image) -> Image.Image:
    """`panel` in light greys, on which colours stand out."""
    white = Image.new("RGB", panel.size, "white")
    return Image.blend(panel.convert("L").convert("RGB"), white, 0.4)


def _stretched(values: np.ndarray) -> np.ndarray:
    """`values` to 0 to 1, from the least to the most; equal ones to the middle."""
    least, most = values.min(), values.max()
    return (values - least) / (most - least) if most > least else np.full(values.shape, 0.5)


def _heat_colors(values: np.ndarray) -> np.ndarray:
    """Colours `[..., 3]` uint8 of `values` 0 to 1."""
    import matplotlib  # here, as it takes long to import

    return matplotlib.colormaps[COLORMAP](values, bytes=True)[..., :3]


def _dot(
    draw: ImageDraw.ImageDraw, center: Sequence[float], weight: float, color: Color, outside: bool
) -> None:
    """A dot whose area and opacity grow with `weight`; a ring if `outside`."""
    radius = FINER * RADIUS * math.sqrt(weight)
    box = tuple(side + sign * radius for sign in (-1, 1) for side in center)
    if outside:
        draw.ellipse(box, outline=(*color, 200), width=FINER)
    else:
        draw.ellipse(box, fill=(*color, round(90 + 165 * weight)), outline=(255, 255, 255, 150))


def _square(draw: ImageDraw.ImageDraw, center: Sequence[float], weight: float) -> None:
    """The mark of a token, of the area of a dot of this `weight`."""
    half = FINER * RADIUS * math.sqrt(weight * math.pi) / 2
    (x, y), edge = center, 2 * FINER
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


def _fitted(photo: Image.Image) -> Image.Image:
    """`photo` with a longer side of `PANEL`; the pixels of small ones stay visible."""
    factor = PANEL / max(photo.size)
    size = tuple(max(1, round(side * factor)) for side in photo.size)
    way = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return photo.resize((size[0], size[1]), way)


def _by_stage(blocks: Sequence[BlockOffsets], photo: Image.Image) -> list[Stage]:
    """The blocks by stage; UserError if they are not of this one image or not finite."""
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
            raise UserError(f"block {block.block} of stage {block.stage} has offsets not finite")
    stages = []
    for number in sorted({block.stage for block in blocks}):
        own = [block for block in blocks if block.stage == number]
        shown = own[0]
        for block in own[1:]:
            pairs = (block.offset_w, shown.offset_w), (block.offset_h, shown.offset_h)
            if not all(np.array_equal(*pair) for pair in pairs):
                shown = block
        stages.append(Stage(shown, own))
    return stages


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """`text` in lines of at most `width` pixels."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _header() -> Image.Image:
    """Title, explanation, legend, and what the columns are."""
    lines = _wrapped(EXPLANATION, WIDTH - 2 * MARGIN, SIZE)
    legend_y = 58 + len(lines) * LINE + 12
    page = Image.new("RGB", (WIDTH, legend_y + 90), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 14), TITLE, fill=INK, font=_font(26))
    for number, line in enumerate(lines):
        draw.text((MARGIN, 58 + number * LINE), line, fill=INK, font=_font(SIZE))
    x = MARGIN
    for marks, text in LEGEND:
        for kind, outside in marks:
            page.paste(_mark(kind, outside), (x, legend_y))
            x += 20
        draw.text((x + 6, legend_y), text, fill=INK, font=_font(SIZE))
        x += 6 + round(_font(SIZE).getlength(text)) + 32
    for column, text in enumerate(HEADINGS):
        place = MARGIN + column * (PANEL + MARGIN), legend_y + 46
        draw.text(place, text, fill=INK, font=_font(18))
    return page


def _mark(kind: str, outside: bool = False) -> Image.Image:
    """A mark of the legend, 20 by 20 pixels."""
    page = Image.new("RGB", (20 * FINER, 20 * FINER), "white")
    draw, middle = ImageDraw.Draw(page, "RGBA"), (10 * FINER, 10 * FINER)
    if kind == "own":
        _square(draw, middle, 0.6)
    else:
        _dot(draw, middle, 0.6, COLORS[kind], outside)
    return page.resize((20, 20), Image.Resampling.BOX)


def _figures(stage: Stage, reach: np.ndarray) -> Image.Image:
    """What there is to say of a stage in numbers, `TEXT` by `TEXT_HEIGHT` pixels."""
    page = Image.new("RGB", (TEXT, TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    shown = stage.shown
    _, height, width, _ = shown.offset_w.shape
    numbers = figures(stage.blocks)

    def write(y: int, text: str, size: int = SIZE - 1, color: Color = INK, x: int = 0) -> None:
        draw.text((x, y), text, fill=color, font=_font(size))

    write(-4, f"Stage {shown.stage}", 22)
    write(28, f"{width} by {height} tokens, {shown.stride} pixels apart", color=FAINT)
    write(48, f"{len(stage.blocks)} blocks; dots: block {shown.block}", color=FAINT)

    write(80, "Mean reach", SIZE + 1)
    for number, source in enumerate(("row", "column")):
        y = 104 + number * LINE
        page.paste(_mark(source), (0, y - 1))
        write(y, f"{source} {numbers.reach[number]:.1f} pixels", x=26)

    write(158, "Share in the mix", SIZE + 1)
    left = 0.0
    for number, (source, share) in enumerate(zip(COLORS, numbers.shares, strict=True)):
        right = left + share * (TEXT - 1)
        draw.rectangle((left, 184, right, 199), fill=COLORS[source], outline=INK)
        write(203, f"{source} {100 * share:.0f}%", SIZE - 2, x=SHARES_AT[number])
        left = right
    write(223, f"{100 * numbers.outside:.0f}% of the reads are outside", color=FAINT)

    write(255, "Colours of the map", SIZE + 1)
    grey, scale = Image.new("RGB", (TEXT, 16), "grey"), np.linspace(reach.min(), reach.max(), TEXT)
    page.paste(draw_reach(grey, scale[None]), (0, 281))
    most = f"{reach.max():.1f} pixels"
    if reach.max() > reach.min():
        write(300, f"{reach.min():.1f}")
    write(300, most, x=TEXT - math.ceil(_font(SIZE - 1).getlength(most)))
    return page
