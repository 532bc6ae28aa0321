"""Decode image files, within limits that protect against malicious files."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import read_file

try:
    import simplejpeg
except ImportError:  # optional; Pillow gives the same pixels, a little more slowly
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"
ORIENTATION_TAG = 0x0112  # EXIF tag

MOST_BYTES = 2**30  # limit on the size of an image file
MOST_PIXELS = 178_956_970  # Pillow refuses larger images as well
# Pillow warns about images above half of MOST_PIXELS, but one such image does no harm. It also
# warns about damaged metadata such as EXIF, which does not affect the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")

# The formats that are decoded. Pillow supports more, but for EPS it runs an external program, and
# its code for most others gets little scrutiny.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(".avif", ".jfif", ".jp2"),
)
# Suffixes of images in formats that are not supported.
OTHER_SUFFIXES = (
    *(".apng", ".arw", ".cr2", ".cr3", ".dcm", ".dib", ".dng", ".eps", ".exr", ".hdr", ".heic"),
    *(".heics", ".heif", ".hif", ".ico", ".j2k", ".jpe", ".jpf", ".jpx", ".jxl", ".jxr", ".nef"),
    *(".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".svg"),
    *(".tga", ".xcf"),
)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"  # bytes 24 and 25 are the bit depth and the color type
MAX_LISTED = 3  # a message lists at most this many files


class BrokenImageError(UserError):
    """Raised if an image cannot be read; the message names the image and gives the reason."""


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of an image file; raise BrokenImageError if that fails."""
    try:
        return read_file(path, MOST_BYTES)
    except UserError as error:
        raise BrokenImageError(str(error)) from error


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode an image to pixels, `[H, W, 3]` uint8 RGB.

    Gray images get three equal channels, alpha is dropped, palette indices become colors, and
    16-bit values keep their upper eight bits. As in the authors' release, an EXIF orientation is
    not applied.

    `data` is an image file in one of `FORMATS`; error messages call it `name`. Raise
    BrokenImageError if it is not an image, is truncated, or has more than `MOST_PIXELS` pixels.
    """
    if simplejpeg is not None and data.startswith(JPEG_MAGIC):
        # simplejpeg raises an error where libjpeg only warns. Pillow may still read such a file;
        # otherwise, its error gives the reason.
        with contextlib.suppress(ValueError, MemoryError):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in ("YCbCr", "Gray") and height * width <= MOST_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB")
    return decode_with_pillow(data, name)


def decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    """Decode like `decode`, but always with Pillow."""
    with open_image(data, name) as image:
        return np.asarray(to_rgb(image))


@contextlib.contextmanager
def open_image(
    data: bytes, name: str, what: str = "image", error: type[UserError] = BrokenImageError
) -> Iterator[Image.Image]:
    """Open an encoded image in Pillow, without decoding it, and close it on exit.

    `data` is a file in one of `FORMATS`. The other arguments are those of `pillow_errors`.
    """
    with pillow_errors(name, what, error), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_pixels(image)
        yield image


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError if an image, decoded or not, has more than `MOST_PIXELS` pixels."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it has {image.width:,} x {image.height:,} pixels, expected at most {MOST_PIXELS:,}"
        )


@contextlib.contextmanager
def pillow_errors(name: str, what: str, error: type[UserError]) -> Iterator[None]:
    """Turn any exception inside the `with` block into an `error` that gives the reason.

    Pillow can raise anything on a damaged file, including KeyError and struct.error. A UserError
    passes unchanged. In the message, `name` is the file, and `what` is 'image' or 'mask'.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as problem:  # its message only names a buffer
        raise error(f"{name} is not a readable {what}: no known format") from problem
    except MemoryError as problem:
        raise error(f"{name} is not a readable {what}: there is not enough memory") from problem
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise error(f"{name} is not a readable {what}: {problem}") from problem
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise error(f"{name} is not a readable {what}: {reason}") from problem


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits per channel; transparent pixels keep their colors."""
    if image.mode.startswith("I;16"):  # 16 bits per pixel; Pillow's own conversion clips at 255
        upper = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, without Pillow's warning
    return image.convert("RGB")


def decode_mask(data: bytes, name: str, *, as_rgb: bool = False) -> np.ndarray:
    """Decode a mask to its stored values, `[H, W]` uint8, without looking up a palette.

    If `as_rgb`, three equal channels are accepted too. Raise UserError if the data is not an image,
    or does not have one channel of 8 bits.
    """
    if data.startswith(PNG_MAGIC) and data[25:26] == b"\0" and data[24] in (2, 4):
        # Pillow scales gray values of fewer bits up to 8 bits, which changes the class indices.
        raise UserError(f"{name} has {data[24]} bits a pixel, expected 8 with a class index each")
    with open_image(data, name, "mask", UserError) as image:
        if image.mode in ("L", "P"):
            return np.array(image)
        if as_rgb and image.mode == "RGB":
            channels = np.array(image)
            if (channels == channels[..., :1]).all():
                return channels[..., 0]
        mode, bands = image.mode, len(image.getbands())
    if bands > 1:
        raise UserError(f"{name} has {bands} channels, expected one with a class index a pixel")
    raise UserError(
        f"{name} has pixels of Pillow's mode {mode!r}, expected 8 bits with a class index a pixel"
    )


def read_shape(data: bytes, name: str) -> tuple[int, int]:
    """Read (height, width) from an image's header; raise BrokenImageError if that fails."""
    with open_image(data, name) as image:
        return image.height, image.width


def is_turned(data: bytes) -> bool:
    """Return whether the EXIF orientation of an image file tells viewers to rotate or mirror it.

    Return False for TIFF files, because Pillow rotates them itself.
    """
    if data.startswith(JPEG_MAGIC) and data.find(b"Exif", 0, 2**16) < 0:
        return False
    with contextlib.suppress(Exception), open_image(data, "") as image:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return exif.get(ORIENTATION_TAG, 1) in range(2, 9)
    return False


def warn_of_orientation(images: Iterable[bytes], where: object) -> None:
    """Warn on stderr if any of `images`, a sample of a dataset's files, has an EXIF orientation."""
    turned = [is_turned(image) for image in images]
    if any(turned):
        warn(
            f"{where}: {sum(turned)} of {len(turned)} images looked at carry an EXIF orientation, "
            "which is not applied"
        )


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of a supported image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_other_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an unsupported format and is not hidden."""
    return name.lower().endswith(OTHER_SUFFIXES) and not name.startswith(".")


def describe_left_out(names: Sequence[str]) -> str:
    """Describe image files in unsupported formats: how many, which, and what to do about them."""
    named = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    kinds = ", ".join(sorted({Path(name).suffix.lower() for name in names}))
    many = f"{len(names)} files" if len(names) > 1 else "1 file"
    return f"{many} left out: {named} (not read: {kinds}; convert to JPEG or PNG)"


def warn(message: str) -> None:
    """Print a message to stderr as one line that is safe for a terminal."""
    print(one_line(message), file=sys.stderr, flush=True)
