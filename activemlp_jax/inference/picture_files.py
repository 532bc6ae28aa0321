"""Picture files that commands write; they carry our name, so that only they are replaced."""

import warnings
from pathlib import Path

from PIL import ExifTags, Image

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import check_output_file, write_aside

SOFTWARE = "activemlp_jax"  # in the EXIF field of that name


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in the format that the path's ending names.

    Raises:
      UserError: the file cannot be written.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    form = Image.registered_extensions()[path.suffix.lower()]
    try:
        with write_aside(path) as aside:
            picture.save(aside, form, exif=exif)
    except OSError as error:  # Pillow's own names no file
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_picture(path: Path, overwrite: bool) -> str:
    """Check that a picture may be written to `path`.

    Args:
      path: to write.
      overwrite: whether a file may be replaced that `save_picture` did not write.

    Returns:
      What will be done to the path: 'wrote', or 'replaced' where it is there.

    Raises:
      UserError: it cannot be written, or something else is there.
    """
    done = check_output_file(path)
    if path.is_symlink():
        done, there = "replaced", "is a link"
    elif done == "wrote" or _is_ours(path):
        return done
    else:
        there = "is already there, and not known to be by this command"
    if not overwrite:
        raise UserError(f"{path} {there}; give another place, or --overwrite to replace it")
    return done


def _is_ours(path: Path) -> bool:
    """Whether the file at `path` is a picture that `save_picture` wrote."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")  # an overlay may be as large as a photo
            return picture.getexif().get(ExifTags.Base.Software) == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
