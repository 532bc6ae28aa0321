"""Encoded images of every kind become the same RGB pixels with every decoder."""

import importlib.util
import io
import itertools
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from activemlp_jax.data import decoding
from activemlp_jax.data.decoding import (
    MOST_PIXELS,
    BrokenImageError,
    decode,
    decode_mask,
    decode_with_pillow,
    is_turned,
    read_image_file,
)
from activemlp_jax.inference.images import pixels_of
from activemlp_jax.utils.errors import UserError

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
    assert np.abs(ours.astype(int) - PHOTO).mean() < 10, "colors are not inverted"


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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(width: int, height: int, bits: int, color: int, *chunks: bytes) -> bytes:
    """Encode a PNG file with a header and `chunks`."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b"")]
    )


def sixteen_bit_rgb_png(values: np.ndarray) -> bytes:
    """Encode `values` `[H, W, 3]` uint16 as PNG, a mode that Pillow reads but does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, 2, png_chunk(b"IDAT", zlib.compress(rows)))


def test_sixteen_bit_colors_keep_their_upper_eight():
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
    with pytest.raises(BrokenImageError, match=rf"^a/b\.jpg is not a readable image: .*({reason})"):
        decode(data, "a/b.jpg")


def test_without_the_fast_decoder_all_is_read_by_pillow(monkeypatch: pytest.MonkeyPatch):
    data = encode(PHOTO, "JPEG")
    expected = decode(data, "photo")
    monkeypatch.setattr(decoding, "simplejpeg", None)
    np.testing.assert_array_equal(decode(data, "photo"), expected)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Change the size that the header of a JPEG file claims."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


SIDE = 13_378  # its square is just above the limit
JPEG = encode(PHOTO, "JPEG")
TOO_LARGE = {
    "JPEG": with_size(JPEG, SIDE, SIDE),
    "JPEG of 12 GiB": with_size(JPEG, 65_500, 65_500),
    "gray JPEG": with_size(encode(PHOTO[..., 0], "JPEG"), SIDE, SIDE),
    "PNG": png(SIDE, SIDE, 8, 0, png_chunk(b"IDAT", zlib.compress(b"\0" * 100))),
    "BMP": encode(PHOTO, "BMP")[:18] + struct.pack("<II", SIDE, SIDE) + encode(PHOTO, "BMP")[26:],
}


@pytest.mark.parametrize("read", [decode, decode_with_pillow, decode_mask])
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(
    kind: str, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    assert MOST_PIXELS < SIDE**2 < MOST_PIXELS + 2 * SIDE
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", None)
    message = r"^a/b\.jpg is not a readable (image|mask): .*178,?956,?970"
    with pytest.raises(UserError, match=message):
        read(TOO_LARGE[kind], "a/b.jpg")


def test_the_limit_is_ours_where_pillows_is_taken_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BrokenImageError, match=r"it has 13,378 x 13,378 pixels, expected at most"):
        decode(TOO_LARGE["PNG"], "a.png")
    with (
        Image.open(io.BytesIO(TOO_LARGE["PNG"])) as image,
        pytest.raises(BrokenImageError, match="image 3 is not a readable image: it has 13,378 x"),
    ):
        pixels_of(image, "image 3")


def test_a_large_image_below_the_limit_is_read_without_pillows_warning():
    spec = importlib.util.spec_from_file_location("decoding_again", decoding.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    large = png(10_000, 10_000, 8, 0, png_chunk(b"IDAT", b""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec.loader.exec_module(again)
        with again.open_image(large, "large.png") as image:
            assert image.size == (10_000, 10_000)
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_text_or_a_profile_that_unpacks_to_much_is_refused(kind: bytes):
    bomb = png_chunk(kind, b"name\0\0" + zlib.compress(b" " * 2**22))
    pixel = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    with pytest.raises(BrokenImageError, match=r"a\.png is not a readable image: .*too large"):
        decode(png(1, 1, 8, 0, bomb, pixel), "a.png")


@pytest.mark.parametrize(
    "error", [MemoryError(), OverflowError("too large"), KeyError(3), struct.error("unpack")]
)
def test_whatever_a_decoder_raises_names_the_image(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    if isinstance(error, MemoryError):
        monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", fail)
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    with pytest.raises(BrokenImageError, match=r"^a/b\.jpg is not a readable image: \w"):
        decode(JPEG, "a/b.jpg")
    with pytest.raises(BrokenImageError, match=r"^it is not a readable image: \w"):
        pixels_of(Image.fromarray(PHOTO), "it")


def test_programs_are_not_read_as_images():
    """Pillow would pass these files to Ghostscript, which runs them as programs."""
    with pytest.raises(BrokenImageError, match="no known format"):
        decode(encode(PHOTO, "EPS"), "a.png")


def test_pipes_devices_and_folders_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    (tmp_path / "folder.png").mkdir()
    for name, kind in (("pipe", "a pipe"), ("zero", "a device"), ("folder", "a folder")):
        with pytest.raises(BrokenImageError, match=rf"{name}\.png .*{kind}"):
            read_image_file(tmp_path / f"{name}.png")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_an_orientation_is_seen_but_an_upright_one_is_none(file_format: str):
    for orientation, turned in ((1, False), (3, True), (6, True), (8, True), (99, False)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert is_turned(encode(PHOTO, file_format, exif=exif)) == turned, orientation
    assert not is_turned(encode(PHOTO, file_format))
    assert not is_turned(b"no image")
    assert not is_turned(JPEG[:3] + b"Exif" + JPEG[3:])
