"""Encoded images of every kind become the same RGB pixels, whatever decodes them."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from activemlp_jax.data import decoding
from activemlp_jax.data.decoding import BrokenImageError, decode, decode_with_pillow

PHOTO = load_sample_image("china.jpg")[100:199, 200:333]


def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("subsampling", "progressive", "mode"),
    list(itertools.product((0, 1, 2), (False, True), ("RGB", "L"))),
)
def test_the_fast_decoder_gives_pillows_pixels(subsampling: int, progressive: bool, mode: str):
    assert decoding.simplejpeg is not None, "the tests need simplejpeg"
    image = Image.fromarray(PHOTO).convert(mode)
    for size in ((133, 99), (132, 98), (17, 31), (1, 1)):
        data = encode(
            image.resize(size), "JPEG", quality=90, subsampling=subsampling, progressive=progressive
        )
        np.testing.assert_array_equal(decode(data, "photo"), decode_with_pillow(data, "photo"))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_files_give_their_pixels(file_format: str):
    np.testing.assert_array_equal(decode(encode(PHOTO, file_format), "photo"), PHOTO)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(file_format: str):
    ours = decode(encode(PHOTO[..., 0], file_format), "photo")
    assert ours.shape == PHOTO.shape
    assert (ours == ours[..., :1]).all()
    if file_format == "PNG":
        np.testing.assert_array_equal(ours[..., 0], PHOTO[..., 0])


def test_cmyk_is_read_as_pillow_reads_it():
    data = encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95)
    ours = decode(data, "photo")
    np.testing.assert_array_equal(ours, decode_with_pillow(data, "photo"))
    assert np.abs(ours.astype(int) - PHOTO).mean() < 10, "colours are not inverted"


def test_palettes_are_looked_up_and_alpha_is_dropped():
    palette = Image.fromarray(PHOTO).convert("P", palette=Image.Palette.ADAPTIVE)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(palette, "PNG"), "photo"), expected)
    transparent = encode(palette, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode(transparent, "photo"), expected)
    alpha = np.concatenate([PHOTO, PHOTO[..., :1]], axis=-1)
    np.testing.assert_array_equal(decode(encode(alpha, "PNG"), "photo"), PHOTO)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(file_format: str):
    values = np.arange(256 * 16, dtype=np.uint16).reshape(64, 64) * 16
    ours = decode(encode(values, file_format), "photo")
    np.testing.assert_array_equal(ours[..., 0], values >> 8)


def sixteen_bit_rgb_png(values: np.ndarray) -> bytes:
    """A PNG of `values` `[H, W, 3]` uint16, which Pillow reads but does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bit_colours_keep_their_upper_eight():
    values = PHOTO.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(decode(sixteen_bit_rgb_png(values), "photo"), PHOTO)


def test_an_orientation_beside_the_pixels_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = encode(PHOTO, "JPEG", quality=90, exif=exif)
    plain = encode(PHOTO, "JPEG", quality=90)
    np.testing.assert_array_equal(decode(turned, "photo"), decode(plain, "photo"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known format"),
        (b"no image at all", "no known format"),
        (encode(PHOTO, "PNG")[:500], "truncated|broken"),
        (encode(PHOTO, "JPEG")[:1500], "truncated"),
        (encode(PHOTO, "JPEG")[:3], "."),
        (encode(PHOTO, "BMP")[:100], "truncated"),
    ],
)
def test_what_is_no_whole_image_is_named_with_the_reason(data: bytes, reason: str):
    with pytest.raises(BrokenImageError, match=rf"^a/b\.jpg is no readable image: .*({reason})"):
        decode(data, "a/b.jpg")


def test_without_the_fast_decoder_all_is_read_by_pillow(monkeypatch: pytest.MonkeyPatch):
    data = encode(PHOTO, "JPEG")
    expected = decode(data, "photo")
    monkeypatch.setattr(decoding, "simplejpeg", None)
    np.testing.assert_array_equal(decode(data, "photo"), expected)
