"""Image files to pixels, within limits: whoever made a file may have meant harm."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import read_file

try:
    import simplejpeg
except ImportError:  # an extra; Pillow gives the same pixels, a little later
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # its number in EXIF data

MOST_BYTES = 2**30  # of an image file
MOST_PIXELS = 178_956_970  # beyond which Pillow refuses an image by itself, too
# Pillow warns about images of more than half that size, which are harmless one at a time. It also
# warns about damaged metadata, such as EXIF, which this package does not need.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow knows more formats. One of them runs a program (EPS), and few are ever looked at.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(".avif", ".jfif", ".jp2"),
)
# Files that a person takes for images, too, but which are not read.
OTHER_SUFFIXES = (
    *(".apng", ".arw", ".cr2", ".cr3", ".dcm", ".dib", ".dng", ".eps", ".exr", ".hdr", ".heic"),
    *(".heics", ".heif", ".hif", ".ico", ".j2k", ".jpe", ".jpf", ".jpx", ".jxl", ".jxr", ".nef"),
    *(".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".svg"),
    *(".tga", ".xcf"),
)
NAMED = 3  # files to list of those left out


class BrokenImageError(UserError):
    """An image that cannot be read; the message names it and says why."""


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file, not decoded.

    Raises:
      BrokenImageError: it is missing, unreadable, too large, or not a regular file.
    """
    try:
        return read_file(path, MOST_BYTES)
    except UserError as error:
        raise BrokenImageError(str(error)) from error


def decode(data: bytes, name: str) -> np.ndarray:
    """The pixels `[H, W, 3]`, uint8 RGB, of an encoded image.

    Grey images get three equal channels, alpha is dropped, palettes are looked up, 16-bit values
    keep their upper eight bits. As in the original, an orientation noted beside the pixels (EXIF)
    is not applied.

    Args:
      data: a file's bytes, of one of `FORMATS`.
      name: for the error.

    Raises:
      BrokenImageError: it is no image, not a whole one, or has more than `MOST_PIXELS`.
    """
    if simplejpeg is not None and data.startswith(JPEG_MAGIC):
        # What libjpeg only warns of, Pillow may read; else it gives the reason.
        with contextlib.suppress(ValueError, MemoryError):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in ("YCbCr", "Gray") and height * width <= MOST_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB")
    return decode_with_pillow(data, name)


def decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    """Decode an image file with Pillow, whatever other decoders are installed; see `decode`."""
    with open_image(data, name) as image:
        return np.asarray(to_rgb(image))


@contextlib.contextmanager
def open_image(
    data: bytes, name: str, what: str = "image", error: type[UserError] = BrokenImageError
) -> Iterator[Image.Image]:
    """Open an encoded image by Pillow, not yet decoded, and close it at the end.

    Args:
      data: a file's bytes, of one of `FORMATS`.
      name: for the error.
      what: the file is, for the error.
      error: to raise where Pillow fails, here or inside.
    """
    with pillow_errors(name, what, error), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_pixels(image)
        yield image


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError if an image, decoded or not, has more than `MOST_PIXELS`."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it has {image.width:,} x {image.height:,} pixels, expected at most {MOST_PIXELS:,}"
        )


@contextlib.contextmanager
def pillow_errors(name: str, what: str, error: type[UserError]) -> Iterator[None]:
    """Raise `error`, with the name and the reason, for anything that Pillow raises inside.

    A damaged file lets Pillow's readers stumble in any way: KeyError and struct.error, too.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as problem:  # its message names a buffer, which says nothing
        raise error(f"{name} is no readable {what}: no known format") from problem
    except MemoryError as problem:
        raise error(f"{name} is no readable {what}: there is not enough memory") from problem
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise error(f"{name} is no readable {what}: {problem}") from problem
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise error(f"{name} is no readable {what}: {reason}") from problem


def to_rgb(image: Image.Image) -> Image.Image:
    """Red, green and blue, 8 bits each; what is transparent shows its own colours."""
    if image.mode.startswith("I;16"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        upper = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def is_turned(data: bytes) -> bool:
    """Whether an image file's EXIF data says that viewers should turn or mirror it.

    False for TIFF files, as Pillow turns them itself.
    """
    if data.startswith(JPEG_MAGIC) and data.find(b"Exif", 0, 2**16) < 0:
        return False
    with contextlib.suppress(Exception), open_image(data, "") as image:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return exif.get(ORIENTATION, 1) in range(2, 9)
    return False


def warn_of_turned(turned: int, looked_at: int, where: object) -> None:
    """Say on standard error how many of a data set's images `is_turned`, if any."""
    if turned:
        warn(
            f"{where}: {turned} of {looked_at} images looked at carry an EXIF orientation, "
            "which is not applied"
        )


def is_image_name(name: str) -> bool:
    """Whether a file of that name is looked at, by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_other_image_name(name: str) -> bool:
    """Whether a file of that name is an image of a kind that is not read, and not hidden."""
    return name.lower().endswith(OTHER_SUFFIXES) and not name.startswith(".")


def describe_left_out(names: Sequence[str]) -> str:
    """How many images of other kinds were left out, the first names, and what to do."""
    named = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    kinds = ", ".join(sorted({Path(name).suffix.lower() for name in names}))
    many = f"{len(names)} files" if len(names) > 1 else "1 file"
    return f"{many} left out: {named} (not read: {kinds}; convert to JPEG or PNG)"


def warn(message: str) -> None:
    """Print one line to standard error, fit for a terminal."""
    print(one_line(message), file=sys.stderr, flush=True)
