"""Pixels of images that are given as Pillow images, arrays or files."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from activemlp_jax.data.decoding import (
    BrokenImageError,
    check_pixels,
    decode,
    pillow_errors,
    read_image_file,
    to_rgb,
)
from activemlp_jax.utils.errors import UserError

EXPECTED = "a Pillow image, a uint8 array or the path of a file"


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the pixels `[H, W, 3]` uint8 of an image file.

    Raises:
      BrokenImageError: if the file does not exist or is not an image.
    """
    return decode(read_image_file(path), str(path))


def list_images(images: Any) -> tuple[list[Any], bool]:
    """List the images, and tell whether `images` is a single image; see `pixels_of`.

    Raises:
      UserError: if `images` has another type or is empty.
    """
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images], True
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        if images.ndim < 4:
            return [images], True
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise UserError(f"images is a {type(images).__name__}, expected {EXPECTED}, or many")
    listed = list(images)
    if not listed:
        raise UserError("images is empty, expected at least one")
    return listed, False


def all_pixels(images: list[Any]) -> Iterator[np.ndarray]:
    """Yield the pixels of each image, read one at a time; see `pixels_of`."""
    for number, image in enumerate(images):
        yield pixels_of(image, f"image {number}" if len(images) > 1 else "the image")


def pixels_of(image: Any, name: str) -> np.ndarray:
    """Convert one image to pixels `[H, W, 3]` uint8 RGB, as `decode` does for files.

    Args:
      image: a Pillow image of any mode, an array `[H, W]` or `[H, W, 3]` uint8, or a path.
      name: name of the image in error messages.

    Raises:
      UserError: if the image has another type, dtype or shape, or cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        with pillow_errors(name, "image", BrokenImageError):
            check_pixels(image)
            return np.asarray(to_rgb(image))  # Pillow reads the pixels of a file only now
    if not hasattr(image, "__array__"):
        raise UserError(f"{name} is a {type(image).__name__}, expected {EXPECTED}")
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UserError(f"{name} has dtype {array.dtype}, expected uint8, values from 0 to 255")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
        raise UserError(f"{name} has shape {array.shape}, expected (H, W) or (H, W, 3)")
    return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1)
