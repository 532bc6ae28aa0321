"""Draw a page that shows where the Active Token Mixer looks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from activemlp_jax.inference.images import pixels_of
from activemlp_jax.inference.offsets import BlockOffsets, group_weights, mean_reach
from activemlp_jax.inference.tiling import logits_side
from activemlp_jax.plots.pictures import add_axes, make_figure, render
from activemlp_jax.utils.errors import UserError

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

Point = tuple[float, float]

DEFAULT_TOKENS: tuple[Point, ...] = ((0.2, 0.3), (0.5, 0.75), (0.8, 0.5))
COLORS = {"row": "#e25800", "column": "#105adc", "own": "#ffffff"}
INK, FAINT = "#202124", "#5f6368"

WIDTH, HEADER, MARGIN, GAP = 1100, 204, 24, 48  # pixels; `GAP` is between rows
PANEL = 384  # longer side of a picture
RING_DISTANCE = 10  # from the picture to a ring, which marks a read outside the map
TEXT_HEIGHT = 320  # height of a stage's statistics
DOT_SIZE = 18.0  # diameter of a dot with a mixing weight of 1

TITLE = "Where the Active Token Mixer looks"
EXPLANATION = """\
The model sees the picture as a grid of tokens, coarser from stage to stage. A token mixes what it
reads in its row, what it reads in its column, and itself. Where it reads depends on the picture,
and every group of channels has a place of its own: a dot, larger the more it counts."""
HEADINGS = ("Where the marked tokens read", "Mean reach in row and column, by token")


class Statistics(NamedTuple):
    """Means over the tokens and blocks of a stage.

    `reach` is the distance at which a token reads in its row and in its column, in pixels of the
    input; groups are weighted by their mixing weights. `shares` are the mixing weights of the row,
    the column and the token itself. `outside` is the share of reads, in rows and columns, that lie
    outside the map.
    """

    reach: np.ndarray  # [2]
    shares: np.ndarray  # [3]
    outside: float


def stage_statistics(blocks: Sequence[BlockOffsets]) -> Statistics:
    """Compute the statistics of the first image over `blocks`, which belong to one stage."""
    weights = np.stack([group_weights(block)[0] for block in blocks])
    offsets = [(block.offset_w[:1], block.offset_h[:1]) for block in blocks]
    distance = np.array([[np.abs(o).mean((0, 1, 2)) for o in pair] for pair in offsets])
    read_weights = weights[..., :2].swapaxes(1, 2)  # [blocks, 2, G], like `distance`
    reach = blocks[0].stride * (read_weights * distance).sum((0, 2)) / read_weights.sum((0, 2))
    outside = np.mean([[is_outside(w, 2).mean(), is_outside(h, 1).mean()] for w, h in offsets])
    return Statistics(reach, weights.mean((0, 1)), float(outside))


def is_outside(offset: np.ndarray, axis: int) -> np.ndarray:
    """Find where `offset` `[B, H, W, G]` along `axis` 1 or 2 leaves the map; zero is read there."""
    shape = [1, 1, 1, 1]
    shape[axis] = length = offset.shape[axis]
    position = offset + np.arange(length).reshape(shape)
    return (position <= -1) | (position >= length)


def draw_offsets(
    image: Image.Image | np.ndarray,
    blocks: Sequence[BlockOffsets],
    tokens: Sequence[Point] | None = None,
) -> Image.Image:
    """Draw a page with a row per stage: where some tokens read, how far all read, and statistics.

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
      UserError: if the image is invalid, a token lies outside the picture, the blocks belong to
        another image or to several, or offsets are not finite.
    """
    tokens = check_tokens(DEFAULT_TOKENS if tokens is None else tokens)
    photo = Image.fromarray(pixels_of(image, "the image"))
    _check_blocks(blocks, photo)
    width, height = (PANEL * side / max(photo.size) for side in photo.size)
    row_height = max(round(height), TEXT_HEIGHT) + GAP
    stages = sorted({block.stage for block in blocks})
    figure = make_figure(WIDTH, HEADER + len(stages) * row_height)
    _write_header(figure)
    for number, stage in enumerate(stages):
        in_stage = [block for block in blocks if block.stage == stage]
        top = HEADER + number * row_height
        reads = add_axes(figure, MARGIN, top, width, height)
        draw_reads(reads, photo, _last_with_own_offsets(in_stage), tokens)
        reach = np.mean([mean_reach(block)[0] for block in in_stage], axis=0)
        heat = draw_reach(add_axes(figure, 2 * MARGIN + PANEL, top, width, height), photo, reach)
        _draw_statistics(figure, top, in_stage, heat)
    return render(figure)


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


def _check_blocks(blocks: Sequence[BlockOffsets], photo: Image.Image) -> None:
    """Raise UserError if the blocks are not those of this one image, or offsets are not finite."""
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


def _last_with_own_offsets(blocks: Sequence[BlockOffsets]) -> BlockOffsets:
    """Find the last block whose offsets are not those of the block before it."""
    chosen = blocks[0]
    for block in blocks:
        same_w = np.array_equal(block.offset_w, chosen.offset_w)
        if not (same_w and np.array_equal(block.offset_h, chosen.offset_h)):
            chosen = block
    return chosen


def _show_photo(axes: "Axes", photo: Image.Image, height: int, width: int) -> None:
    """Show `photo` in light grays, on which colors stand out, on axes in units of tokens."""
    gray = np.asarray(photo.convert("L"))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    # This range blends the grays with 40% white.
    axes.imshow(gray, cmap="gray", vmin=-170, vmax=255, extent=extent, aspect="auto")
    axes.set_autoscale_on(False)


def draw_reads(
    axes: "Axes", photo: Image.Image, block: BlockOffsets, tokens: Sequence[Point]
) -> None:
    """Draw where `tokens` read in `block`: dots on `photo`, or rings next to it if outside."""
    from matplotlib.colors import to_rgba

    _, height, width, groups = block.offset_w.shape
    _show_photo(axes, photo, height, width)
    size = np.array((width, height))
    weights = group_weights(block)[0]
    for row, column in dict.fromkeys(
        (min(int(y * height), height - 1), min(int(x * width), width - 1)) for x, y in tokens
    ):
        axes.axhline(row, color=INK, alpha=0.27, linewidth=1)
        axes.axvline(column, color=INK, alpha=0.27, linewidth=1)
        for number, source, offset in ((0, "row", block.offset_w), (1, "column", block.offset_h)):
            points = np.full((groups, 2), (column, row), float)
            points[:, number] += offset[0, row, column]
            outside = is_outside(offset, 2 - number)[0, row, column]
            beyond = outside[:, None] * RING_DISTANCE * size / axes.bbox.size
            points = np.clip(points, -0.5 - beyond, size - 0.5 + beyond)
            counts = weights[:, number]
            opacity = np.where(outside, 0, 0.35 + 0.65 * counts)
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=DOT_SIZE**2 * counts,
                color=[to_rgba(COLORS[source], min(alpha, 1)) for alpha in opacity],
                edgecolors=[to_rgba(COLORS[source] if out else "white", 0.7) for out in outside],
                linewidths=np.where(outside, 1.2, 0.6).tolist(),
                clip_on=False,
                zorder=2,
            )
        # The square has the area of a dot.
        side = DOT_SIZE * np.sqrt(weights[:, 2].mean() * np.pi) / 2
        axes.scatter(
            column,
            row,
            s=(side + 2) ** 2,
            marker="s",
            color=COLORS["own"],
            edgecolors=INK,
            linewidths=2,
            clip_on=False,
            zorder=3,
        )


def draw_reach(axes: "Axes", photo: Image.Image, reach: np.ndarray) -> "AxesImage":
    """Draw `reach` `[H, W]`, in pixels, over `photo`; the color map spans its range."""
    _show_photo(axes, photo, *reach.shape)
    return axes.imshow(reach, cmap="inferno", alpha=0.75, aspect="auto", interpolation="nearest")


def _write_header(figure: "Figure") -> None:
    """Write the title, the explanation, the legend and the column headings."""
    from matplotlib.legend_handler import HandlerTuple

    axes = add_axes(figure, MARGIN, 0, WIDTH - 2 * MARGIN, HEADER)
    axes.set(xlim=(0, WIDTH - 2 * MARGIN), ylim=(HEADER, 0))
    axes.text(0, 14, TITLE, size=24, color=INK, va="top")
    axes.text(0, 50, EXPLANATION, size=14.5, color=INK, va="top", linespacing=1.35)
    marks: dict[str, Line2D | tuple[Line2D, ...]] = {
        "the token itself": _mark("own", marker="s"),
        "read in its row": _mark("row"),
        "read in its column": _mark("column"),
        "outside the map: reads zero": tuple(
            _mark(source, hollow=True) for source in ("row", "column")
        ),
    }
    axes.legend(
        marks.values(),
        marks.keys(),
        handler_map={tuple: HandlerTuple(ndivide=None)},
        loc="upper left",
        bbox_to_anchor=(0, 1 - 124 / HEADER),
        ncols=len(marks),
        fontsize=14.5,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
    )
    for number, heading in enumerate(HEADINGS):
        axes.text(number * (PANEL + MARGIN), HEADER - 26, heading, size=17, color=INK, va="bottom")


def _mark(source: str, marker: str = "o", hollow: bool = False) -> "Line2D":
    """Make a mark of the legend."""
    from matplotlib.lines import Line2D

    edge = INK if source == "own" else COLORS[source]
    return Line2D(
        [],
        [],
        linestyle="",
        marker=marker,
        markersize=13,
        markerfacecolor="none" if hollow else COLORS[source],
        markeredgecolor=edge,
        markeredgewidth=2 if source == "own" else 1.2,
    )


def _draw_statistics(
    figure: "Figure", top: float, blocks: Sequence[BlockOffsets], heat: "AxesImage"
) -> None:
    """Draw the statistics of a stage and the color bar of its map `heat`, right of the map."""
    left = 3 * MARGIN + 2 * PANEL
    width = WIDTH - left - MARGIN
    dots = _last_with_own_offsets(blocks)
    statistics = stage_statistics(blocks)
    _, rows, columns, _ = dots.offset_w.shape
    axes = add_axes(figure, left, top, width, TEXT_HEIGHT)
    axes.set(xlim=(0, width), ylim=(TEXT_HEIGHT, 0))

    def write(y: float, text: str, color: str = INK, size: float = 13.5) -> None:
        axes.text(0, y, text, size=size, color=color, va="top")

    write(0, f"Stage {dots.stage}", size=20)
    write(30, f"{columns} by {rows} tokens, {dots.stride} pixels apart", FAINT)
    write(50, f"{len(blocks)} blocks; dots: block {dots.block}", FAINT)
    write(84, "Mean reach", size=16)
    write(106, f"row {statistics.reach[0]:.1f} pixels", COLORS["row"])
    write(126, f"column {statistics.reach[1]:.1f} pixels", COLORS["column"])
    write(160, "Share in the mix", size=16)
    start, shares = 0.0, dict(zip(COLORS, statistics.shares, strict=True))
    for source, share in shares.items():
        axes.barh(191, share * width, 16, start, color=COLORS[source], edgecolor=INK, clip_on=False)
        start += share * width
    write(206, ", ".join(f"{source} {100 * share:.0f}%" for source, share in shares.items()))
    write(226, f"{100 * statistics.outside:.0f}% of the reads are outside", FAINT)
    write(258, "Colors of the map, in pixels", size=16)
    scale = figure.colorbar(
        heat,
        cax=add_axes(figure, left, top + 281, width, 16),
        orientation="horizontal",
        ticks=np.unique(heat.get_clim()),
        format="%.1f",
    )
    scale.ax.set_axis_on()
    scale.ax.tick_params(labelsize=12.5)
