"""Render figures, and write marked picture files, so that commands replace only their own."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import check_output_file, write_aside

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFTWARE = "activemlp_jax"  # content of the EXIF field Software


def make_figure(width: float, height: float) -> "Figure":
    """Make a figure of `width` by `height` pixels, in which a point is a pixel."""
    from matplotlib.figure import Figure

    return Figure(((width + 0.5) / 72, (height + 0.5) / 72), dpi=72)  # Agg rounds down


def add_axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Add axes without ticks and frame, placed in pixels from the top left of the figure."""
    page_width, page_height = figure.bbox.size
    bottom = page_height - top - height
    box = (left / page_width, bottom / page_height, width / page_width, height / page_height)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return axes


def render(figure: "Figure") -> Image.Image:
    """Render a figure as an RGB picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def shortened(name: str, length: int) -> str:
    """Cut a class name to one line of at most `length` characters."""
    name = one_line(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, marked as ours, in the format that the extension of `path` names."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    try:
        with write_aside(path) as temporary:
            picture.save(temporary, picture_format, exif=exif)
    except OSError as error:  # Pillow's errors do not name the file
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_picture(path: Path, overwrite: bool) -> str:
    """Check that a picture may be written to `path`; return 'wrote', or 'replaced' if it exists.

    Raises:
      UserError: if `path` cannot be written; or, unless `overwrite`, if it is a link or a file that
        `save_picture` did not write.
    """
    done = check_output_file(path)
    if path.is_symlink():
        done, obstacle = "replaced", "is a link"
    elif done == "replaced" and not _is_ours(path):
        obstacle = "is already there, and not known to be by this command"
    else:
        return done
    if not overwrite:
        raise UserError(f"{path} {obstacle}; give another place, or --overwrite to replace it")
    return done


def _is_ours(path: Path) -> bool:
    """Return whether the file at `path` is a picture that `save_picture` wrote."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            # Pillow warns about large pictures, and an overlay may be as large as a photo.
            warnings.simplefilter("ignore")
            return picture.getexif().get(ExifTags.Base.Software) == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
