"""Encoded images to pixels."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from activemlp_jax.errors import UserError

try:
    import simplejpeg
except ImportError:  # an extra; Pillow gives the same pixels, a little later
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"


class BrokenImageError(UserError):
    """An image that cannot be read; the message names it and says why."""


def decode(data: bytes, name: str) -> np.ndarray:
    """The pixels `[H, W, 3]`, uint8 RGB, of an encoded image.

    Grey images get three equal channels, alpha is dropped, palettes are looked up, 16-bit values
    keep their upper eight bits. As in the original, an orientation noted beside the pixels (EXIF)
    is not applied.

    Args:
      data: a file's bytes, of any format that Pillow reads.
      name: for the error.

    Raises:
      BrokenImageError: it is no image, or not a whole one.
    """
    if simplejpeg is not None and data.startswith(JPEG_MAGIC):
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # what libjpeg only warns of, Pillow may read; else it gives the reason
    return decode_with_pillow(data, name)


def decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    """As `decode`, by Pillow alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(to_rgb(image))
    except UnidentifiedImageError as error:  # its message names a buffer, which says nothing
        raise BrokenImageError(f"{name} is no readable image: no known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"{name} is no readable image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Red, green and blue, 8 bits each; what is transparent shows its own colours."""
    if image.mode.startswith("I;16"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        upper = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")
