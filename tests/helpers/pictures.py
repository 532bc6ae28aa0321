"""Photos, and folders of image files, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


def photo(number: int, width: int, height: int) -> Image.Image:
    """Return a crop of a sample photograph, a different one for each number."""
    pixels = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
    rng = np.random.default_rng(number)
    top = rng.integers(pixels.shape[0] - height + 1)
    left = rng.integers(pixels.shape[1] - width + 1)
    return Image.fromarray(pixels[top : top + height, left : left + width])


def encoded(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    """Encode an image file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def save_photos(folder: Path, classes: list[str], count: int, size: tuple[int, int]) -> None:
    """Save a folder per class with `count` JPEG files of `size`, width by height."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = photo(number + 100 * index, *size)
            (folder / name / f"{index:03}.JPEG").write_bytes(encoded(image))


def save_odd_images(folder: Path) -> list[str]:
    """Save two class folders with one image of each unusual kind; return sorted file names."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    picture = photo(0, 90, 60)
    sixteen_bit = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    files = {
        "alpha.png": encoded(picture.convert("RGBA"), "PNG"),
        "cmyk.jpg": encoded(picture.convert("CMYK")),
        "exif.jpg": encoded(picture, exif=rotated),
        "gray.jpg": encoded(picture.convert("L")),
        "palette.png": encoded(picture.convert("P"), "PNG", transparency=bytes(range(256))),
        "plain.JPEG": encoded(picture),
        "plain.png": encoded(picture, "PNG"),
        "sixteen_bit.png": encoded(sixteen_bit, "PNG"),
        "tiny.png": encoded(picture.resize((1, 1)), "PNG"),
    }
    for number, (name, data) in enumerate(files.items()):
        class_folder = folder / ("even", "odd")[number % 2]
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / name).write_bytes(data)
    return sorted(files)
