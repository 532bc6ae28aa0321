"""Images of every kind become the pixels that evaluation sees; files are found and read."""

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encoded, photo
from PIL import Image

from activemlp_jax.data.decoding import BrokenImageError, decode
from activemlp_jax.inference.images import (
    ImageFile,
    all_pixels,
    find_images,
    list_images,
    pixels_of,
    read_images,
    watched,
)
from activemlp_jax.utils.errors import UserError

PHOTO = photo(0, 30, 20)
PIXELS = np.asarray(PHOTO)
DEEP = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100


def turned() -> Image.Exif:
    """Return the EXIF data that a camera turned by 90 degrees writes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    "color": encoded(PHOTO, "PNG"),
    "gray": encoded(PHOTO.convert("L"), "PNG"),
    "alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "palette": encoded(PHOTO.quantize(16), "PNG", transparency=0),
    "16 bits": encoded(Image.fromarray(DEEP), "PNG"),
    "ink": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "on its side": encoded(PHOTO, "JPEG", exif=turned()),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_pillow_image_has_the_pixels_that_evaluation_reads(kind: str, tmp_path: Path):
    file = tmp_path / "photo"
    file.write_bytes(FILES[kind])
    expected = decode(FILES[kind], kind)
    assert expected.shape == (20, 30, 3)
    with Image.open(file) as image:
        np.testing.assert_array_equal(pixels_of(image, kind), expected)
    np.testing.assert_array_equal(pixels_of(file, kind), expected)
    np.testing.assert_array_equal(pixels_of(str(file), kind), expected)


def test_arrays_are_taken_as_they_are_and_grey_ones_get_three_channels():
    np.testing.assert_array_equal(pixels_of(PIXELS, "it"), PIXELS)
    np.testing.assert_array_equal(pixels_of(jnp.asarray(PIXELS), "it"), PIXELS)
    gray = pixels_of(PIXELS[..., 0], "it")
    np.testing.assert_array_equal(gray, np.stack([PIXELS[..., 0]] * 3, -1))


@pytest.mark.parametrize("one", [PHOTO, PIXELS, PIXELS[..., 0], "a.png", Path("a.png")])
def test_one_image_is_no_sequence(one: Any):
    listed, is_one = list_images(one)
    assert (len(listed), is_one) == (1, True)
    listed, is_one = list_images([one])
    assert (len(listed), is_one) == (1, False)


@pytest.mark.parametrize(
    "many", [np.stack([PIXELS] * 3), jnp.stack([PIXELS] * 3), iter(["a.png", PHOTO, PIXELS])]
)
def test_many_images_are_an_array_or_anything_that_gives_them(many: Any):
    listed, is_one = list_images(many)
    assert (len(listed), is_one) == (3, False)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS / 255, "the image has dtype float64, expected uint8, values from 0 to 255"),
        ([PHOTO, PIXELS > 99], "image 1 has dtype bool, expected uint8"),
        (PIXELS[0, 0], r"the image has shape \(3,\), expected \(H, W\) or \(H, W, 3\)$"),
        (np.zeros((4, 4, 4), np.uint8), r"the image has shape \(4, 4, 4\), expected \(H, W\) or"),
        (np.zeros((0, 4, 3), np.uint8), r"the image has shape \(0, 4, 3\)"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), r"the image has shape \(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "images is empty, expected at least one"),
        ([], "images is empty, expected at least one"),
        (None, "images is a NoneType, expected a Pillow image, a uint8 array or the path of a"),
        (b"\xff\xd8\xff", "images is a bytes, expected"),
        ([PHOTO, 3], "image 1 is a int, expected a Pillow image"),
        ("nowhere.png", "nowhere.png cannot be read: No such file or directory"),
        ([PHOTO, "."], ". is a folder, expected a file"),
    ],
)
def test_what_is_no_image_is_named(images: Any, message: str):
    with pytest.raises(ValueError, match=message) as raised:
        list(all_pixels(list_images(images)[0]))
    assert "\n" not in str(raised.value)


def test_a_pillow_image_of_half_a_file_is_named(tmp_path: Path):
    (tmp_path / "half.png").write_bytes(FILES["color"][:400])
    with (
        Image.open(tmp_path / "half.png") as image,
        pytest.raises(BrokenImageError, match=r"^image 3 is not a readable image: .*truncated"),
    ):
        pixels_of(image, "image 3")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working directory a folder of images, hidden files and other files."""
    for name in ("b.png", "a.JPG", "note.txt", ".b.png", "b_out.png", "z/1.png", "c/2.png",
                 ".trash/x.png", "c/d/3.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES["color"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    return [file.path for file in find_images(paths, leave_out)]


ALL = ["a.JPG", "b.png", "b_out.png", "c/2.png", "c/d/3.png", "z/1.png"]


def test_a_folder_has_the_images_in_it_and_below_in_the_order_of_their_names(tree: Path):
    files = find_images([str(tree)])
    assert [file.inside.as_posix() for file in files] == ALL
    assert [file.path for file in files] == [str(tree / name) for name in ALL]
    names = [file.inside.as_posix() for file in find_images([str(tree)], ("_out.png",))]
    assert names == [name for name in ALL if name != "b_out.png"]


@pytest.mark.parametrize("path", [".", "*"])
def test_images_of_other_kinds_are_left_out_and_counted(
    path: str, tree: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("c/e.HEIC", "f.dng", ".g.heic", "h.txt"):
        (tree / name).write_bytes(b"")
    (tree / "photo.jfif").write_bytes(encoded(PHOTO))
    names = [Path(file.path).as_posix() for file in find_images([path])]
    assert sorted(names) == sorted([*ALL, "photo.jfif"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"{re.escape(path)}: 2 files left out: .* \(not read: \.dng, \.heic; .*", line
    )
    with pytest.raises(UserError, match=r"no images, expected .*; 1 file left out: f\.dng"):
        find_images(["f.*"])


@pytest.mark.usefixtures("tree")
def test_files_are_taken_in_the_order_given_whatever_their_names():
    assert found("note.txt", "b_out.png", "a.JPG", "c", "a.JPG", leave_out=("_out.png",)) == [
        *("note.txt", "b_out.png", "a.JPG", "c/2.png", "c/d/3.png", "a.JPG")
    ]
    (file,) = find_images(["c/d/3.png"])
    assert file.inside == Path("3.png")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["b.png", "b_out.png"]),
        ("*", ALL),
        ("[cz]/*.png", ["c/2.png", "z/1.png"]),
        ("**/*.png", ["b.png", "b_out.png", "c/2.png", "c/d/3.png", "z/1.png"]),
        ("c/**", ["c/2.png", "c/d/3.png"]),
    ],
)
def test_patterns_that_the_shell_left_alone_are_looked_up(pattern: str, expected: list[str]):
    assert found(pattern) == expected


@pytest.mark.usefixtures("tree")
def test_a_file_whose_name_looks_like_a_pattern_is_that_file():
    Path("[cz].png").write_bytes(FILES["color"])
    assert found("[cz].png") == ["[cz].png"]


def test_home_is_known_by_its_sign(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tree))
    assert found("~/z") == found("~/z/*") == [str(tree / "z" / "1.png")]


def test_links_are_followed_but_not_in_circles(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "5.png").write_bytes(FILES["color"])
    os.symlink(elsewhere, tree / "linked")
    os.symlink(tree, tree / "z" / "up")
    names = [file.inside.as_posix() for file in find_images([str(tree)])]
    assert names == [*ALL[:-1], "linked/5.png", "z/1.png"]


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a.JPG", "nowhere"], "there is no file or folder nowhere"),
        ([""], "there is no file or folder "),
        ([".trash/*.gif"], "no file or folder matches .trash/\\*.gif$"),
        (["note.*"], "note.\\* has no images, expected .bmp, .gif"),
        (["empty"], "empty has no images, expected .bmp"),
        (["-", "a.JPG", "-"], "- is given 2 times, but can be read only once"),
    ],
)
def test_paths_without_images_are_named(paths: list[str], message: str):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images(paths)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_files_are_read_in_order_and_those_that_cannot_be_are_reported(
    num_threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number in range(20):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"\x89PNG")
    (tmp_path / "11.png").unlink()
    os.symlink(tmp_path / "gone", tmp_path / "11.png")
    files = find_images([str(tmp_path)])
    broken: list[ImageFile] = []
    read = list(read_images(files, lambda image: image[0, 0, 0], num_threads, broken))
    assert [int(value) for _, value in read] == [n for n in range(20) if n not in (7, 11)]
    assert [file.inside.name for file, _ in read] == [f"{value:02}.png" for _, value in read]
    assert [file.inside.name for file in broken] == ["07.png", "11.png"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"skipped: {tmp_path}/07.png is not a readable image")
    assert second == f"skipped: {tmp_path}/11.png cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("turned", "counted"),
    [(["on its side"] * 2, "2 images carry"), (["on its side"], "1 image carries")],
)
def test_orientations_that_are_not_applied_are_counted_after_the_last_image(
    turned: list[str], counted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number, kind in enumerate(["color", *turned, "gray"]):
        (tmp_path / f"{number}.png").write_bytes(FILES[kind])
    files = find_images([str(tmp_path)])
    assert len(list(read_images(files, np.asarray, 1, []))) == len(turned) + 2
    expected = f"{counted} an EXIF orientation, which is not applied\n"
    assert capsys.readouterr().err == expected


def test_what_could_never_end_is_reported_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    broken: list[ImageFile] = []
    assert list(read_images(find_images([str(tmp_path)]), np.asarray, 0, broken)) == []
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"skipped: {tmp_path}/pipe.png is a pipe, expected a file"
    assert second == f"skipped: {tmp_path}/zero.png is a device, expected a file"


def test_nothing_on_standard_input_is_said_to_be_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    broken: list[ImageFile] = []
    assert list(read_images(find_images(["-"]), np.asarray, 0, broken)) == []
    assert (len(broken), capsys.readouterr().err) == (1, "skipped: standard input is empty\n")


@pytest.mark.parametrize(("terminal", "total"), [(True, 9), (True, 8), (False, 9)])
def test_a_bar_is_shown_on_a_terminal_and_what_is_printed_stays_on_standard_output(
    terminal: bool, total: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    for item in watched(range(total), total):
        print(f"line {item}")
        if item == 4:
            print("problem", file=sys.stderr)
    output, errors = capsys.readouterr()
    assert output.splitlines() == [f"line {item}" for item in range(total)]
    assert "problem" in errors
    assert ("images" in errors) == (terminal and total > 8)
