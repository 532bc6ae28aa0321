"""`python -m activemlp_jax.predict`: what is in photos, for people and for programs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import error_line, run_main
from PIL import Image
from processes import ROOT
from small_models import NAMES, save_classifier, save_photos, save_segmentor

import activemlp_jax as am
from activemlp_jax import predict
from activemlp_jax.inference import classify
from activemlp_jax.inference.offsets import show_to_model
from activemlp_jax.plots.overlays import class_shares
from activemlp_jax.tasks import segmentation_predict
from activemlp_jax.utils.errors import UserError

pytestmark = pytest.mark.xdist_group("predict")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmentor(tmp_path_factory.mktemp("models") / "segmentor")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small batches, which compile faster; five photos need two of them."""
    monkeypatch.setattr(classify, "BATCH_SIZES", (1, 4))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Save five photos in two folders of the working directory; return their relative paths."""
    monkeypatch.chdir(tmp_path)
    return [
        str(file) for file in save_photos(Path(), *(f"{'xy'[i % 2]}/{i}.png" for i in range(5)))
    ]


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its status, output and errors."""
    result = run_main(predict.main, *arguments)
    return result.returncode, result.stdout, result.stderr


def test_each_image_gets_a_line_of_its_most_probable_classes(classifier: Path, photos: list[str]):
    status, output, errors = call(classifier, "x", photos[3], "--json")
    assert (status, errors) == (0, "")
    records = [json.loads(line) for line in output.splitlines()]
    assert [record["image"] for record in records] == ["x/0.png", "x/2.png", "x/4.png", "y/3.png"]
    card, (model, variables) = am.read_card(classifier), am.load_pretrained(classifier)
    for record in records:
        expected = am.classify(model, variables, record["image"], card)
        assert len(record["classes"]) == 5
        for ours, theirs in zip(record["classes"], expected, strict=True):
            assert (ours["index"], ours["name"]) == (theirs.index, theirs.name)
            assert ours["probability"] == pytest.approx(theirs.probability, abs=1e-5)


def test_people_get_a_table(classifier: Path, photos: list[str]):
    Path("[red]odd.png").write_bytes(Path(photos[0]).read_bytes())
    status, output, errors = call(classifier, *photos, "[red]odd.png")
    assert (status, errors) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    rows = [row for row in rows if row]
    assert len(rows) == 6 * 5
    assert [row[0] for row in rows if row[0]] == [*photos, "[red]odd.png"]
    names = {*NAMES, "tench (n01440764)"}
    assert all(name in names and percent.endswith("%") for _, name, percent in rows)
    assert "tench (n01440764)" in output


def test_an_image_that_cannot_be_read_is_reported_and_the_others_go_on(
    classifier: Path, photos: list[str]
):
    Path("x/1.png").write_bytes(b"nothing")
    status, output, errors = call(classifier, "x", "x/1.png", "--json")
    assert status == 1
    assert [json.loads(line)["image"] for line in output.splitlines()] == photos[::2]
    assert errors.splitlines() == ["skipped: x/1.png is not a readable image: no known format"] * 2


def test_patterns_in_quotes_are_looked_up(classifier: Path, photos: list[str]):
    status, output, _ = call(classifier, "?/[13].png", "--json")
    assert status == 0
    assert [json.loads(line)["image"] for line in output.splitlines()] == [photos[1], photos[3]]


def test_an_image_comes_from_standard_input(classifier: Path, photos: list[str]):
    process = subprocess.run(
        [sys.executable, "-m", "activemlp_jax.predict", classifier, "-", "--json"],
        input=Path(photos[0]).read_bytes(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert (process.returncode, process.stderr) == (0, b"")
    record = json.loads(process.stdout)
    card, (model, variables) = am.read_card(classifier), am.load_pretrained(classifier)
    (best,) = am.classify(model, variables, photos[0], card, top=1)
    assert (record["image"], record["classes"][0]["name"]) == ("-", best.name)
    assert record["classes"][0]["probability"] == pytest.approx(best.probability, abs=1e-5)


def test_a_reader_that_has_enough_ends_the_command_without_a_word(
    classifier: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The reader of the output, such as `head`, closes the pipe early."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["predict", str(classifier), *photos, "--json"])
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            predict.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ""


def form(picture: str | Path) -> tuple[str, tuple[int, int]]:
    """Return the Pillow mode and the size of an image file."""
    with Image.open(picture) as image:
        return image.mode, image.size


def test_a_segmentation_model_writes_overlays_with_a_legend(segmentor: Path, photos: list[str]):
    Path("x/1.png").write_bytes(b"nothing")
    status, output, errors = call(segmentor, ".", "--output", "out", "--labels", "--json")
    assert status == 1
    assert errors == "skipped: ./x/1.png is not a readable image: no known format\n"
    records = [json.loads(line) for line in output.splitlines()]
    named = [photos[number] for number in (0, 2, 4, 1, 3)]
    assert [record["image"] for record in records] == [f"./{name}" for name in named]
    model, variables = am.load_pretrained(segmentor)
    for record, name in zip(records, named, strict=True):
        assert record["replaced"] is False
        assert record["overlay"] == f"out/{name.removesuffix('.png')}_overlay.png"
        assert form(record["overlay"])[1][0] > 384
        file = f"out/{name.removesuffix('.png')}_labels.png"
        assert form(file) == ("L", (60, 45))
        expected = am.segment(model, variables, name, am.read_card(segmentor))
        np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)
        shares = {str(label): share for label, share in class_shares(expected)}
        assert record["shares"] == shares


def test_overlays_are_beside_the_images_and_not_taken_for_photos(
    segmentor: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
):
    stdin = io.TextIOWrapper(io.BytesIO(Path(photos[1]).read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    for end in ("_overlay.png", "_overlay.png, replaced"):
        status, output, errors = call(segmentor, "x", "--labels", "--opacity", "0")
        assert (status, errors) == (0, "")
        assert [line.split(":")[0] for line in output.splitlines()] == photos[::2]
        for line, name in zip(output.splitlines(), photos[::2], strict=True):
            assert line.endswith(f"; see {name.removesuffix('.png')}{end}")
    status, output, errors = call(segmentor, "-")
    assert (status, errors) == (0, "")
    assert output.startswith("-: ")
    assert output.endswith("; see stdin_overlay.png\n")
    assert form("stdin_overlay.png")[1][0] > 384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CLASSIFIER", "nowhere.png"), "there is no file or folder nowhere.png"),
        (("CLASSIFIER", "x", "-", "-"), "- is given 2 times, but can be read only once"),
        (("CLASSIFIER", "empty"), "empty has no images, expected .bmp"),
        (("CLASSIFIER", "*.tiff"), "no file or folder matches *.tiff"),
        (("CLASSIFIER", "x", "--labels"), "--labels is for segmentation models, but"),
        (("CLASSIFIER", "x", "--multi-scale"), "--multi-scale is for segmentation models, but"),
        (("CLASSIFIER", "x", "--opacity", "0"), "--opacity is for segmentation models, but"),
        (("CLASSIFIER", "x", "--output", "out"), "--output is for segmentation models, but"),
        (("CLASSIFIER", "x", "--show-offsets", "o.png"), "is for one image, but there are 4"),
        (("CLASSIFIER", "-", "--show-offsets", "o.png"), "--show-offsets needs a file, not -"),
        (("CLASSIFIER", "x", "--token", "0.5,0.5"), "--token says what --show-offsets shows"),
        (("CLASSIFIER", "x/0.png", "--show-offsets", "o.png", "--token", "2,0"), "token (2.0,"),
        (("CLASSIFIER", "x/0.png", "--show-offsets", "o.what"), "is o.what, expected a picture"),
        (("CLASSIFIER", "x/0.png", "--show-offsets", "x/0.png/o.png"), "x/0.png is not a folder"),
        (("CLASSIFIER", "x/0.png", "--show-offsets", "f.png"), "f.png cannot be written: it is a"),
        (("CLASSIFIER", "x/0.png", "--show-offsets", "o.psd"), "is o.psd, expected a picture"),
        (("x", "x"), "x is not a model directory: it has no model.json"),
        (("SEGMENTOR", "x", "--opacity", "2"), "--opacity is 2.0, expected at most 1"),
        (("SEGMENTOR", "x", "--opacity", "nan"), "--opacity is nan, expected at least 0"),
        (("SEGMENTOR", "x/0.png", "x/0.jpg"), "x/0.png and x/0.jpg would both be written to x"),
        (("SEGMENTOR", "y", "--output", "x/0.png"), "x/0.png is not a folder"),
        (("SEGMENTOR", "y", "--show-offsets", "o.png"), "is for one image, but there are 2"),
        (
            ("SEGMENTOR", "y/1.png", "--show-offsets", "y/1_overlay.png"),
            "--show-offsets is y/1_overlay.png, where the labels of an image are written",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_clear_line(
    arguments: tuple[str, ...], message: str, classifier: Path, segmentor: Path,
    photos: list[str],
):  # fmt: skip
    Path("empty").mkdir()
    Path("f.png").mkdir()
    Path("x/0.jpg").touch()
    places = {"CLASSIFIER": str(classifier), "SEGMENTOR": str(segmentor)}
    line = error_line(predict.main, *(places.get(argument, argument) for argument in arguments))
    assert message in line
    assert not list(Path().glob("**/*_overlay.png")), f"{len(photos)} photos alone"


THERE = {
    "a photo": lambda path: path.write_bytes(Path("x/0.png").read_bytes()),
    "a text": lambda path: path.write_text("mine"),
    "a link": lambda path: path.symlink_to(Path("x/0.png").absolute()),
    "a link to nothing": lambda path: path.symlink_to("nothing.png"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize(
    ("kind", "arguments", "target", "there"),
    [
        *(("segmentor", ["x", "--labels"], "x/4_labels.png", there) for there in THERE),
        ("segmentor", ["x"], "x/4_overlay.png", "a photo"),
        ("segmentor", ["x", "--labels", "--output", "out"], "out/4_labels.png", "a photo"),
        ("segmentor", ["x/2.png", "--show-offsets", "x/2.png"], "x/2.png", "itself"),
        ("classifier", ["x/2.png", "--show-offsets", "x/2.png"], "x/2.png", "itself"),
        ("classifier", ["x/2.png", "--show-offsets", "looks.jpg"], "looks.jpg", "a link"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_a_file_of_somebody_else_is_refused_before_any_work(
    kind: str, arguments: list[str], target: str, there: str,
    request: pytest.FixtureRequest,
):  # fmt: skip
    path = Path(target)
    path.parent.mkdir(exist_ok=True)
    if there != "itself":
        THERE[there](path)

    def files() -> dict[Path, tuple[int, ...]]:
        found = {file: os.lstat(file) for file in Path().rglob("*")}
        return {file: (seen.st_ino, seen.st_mtime_ns) for file, seen in found.items()}

    before = files()
    line = error_line(predict.main, request.getfixturevalue(kind), *arguments)
    what = (
        "is a link"
        if path.is_symlink()
        else "is already there, and not known to be by this command"
    )
    expected = f"{target} {what}; give another place, or --overwrite to replace it"
    if path.is_fifo():
        expected = f"{target} cannot be written: it is a pipe"
    assert line == f"command: error: {expected}"
    assert files() == before, "nothing is written or made"


def test_overwriting_replaces_links_and_leaves_what_they_point_to(
    segmentor: Path, photos: list[str]
):
    truth, photo = Path("truth.png"), Path(photos[0]).read_bytes()
    truth.write_bytes(photo)
    for end in ("labels", "overlay"):
        Path(f"x/0_{end}.png").symlink_to(truth.absolute())
    arguments = (segmentor, photos[0], "--labels", "--overwrite", "--json")
    status, output, errors = call(*arguments)
    assert (status, errors) == (0, "")
    assert json.loads(output)["replaced"] is True
    assert truth.read_bytes() == photo
    assert form("x/0_labels.png") == ("L", (60, 45))
    assert not Path("x/0_overlay.png").is_symlink()
    assert sorted(path.name for path in Path("x").glob("0*")) == [
        "0.png", "0_labels.png", "0_overlay.png",
    ]  # fmt: skip
    assert call(*arguments[:3])[0] == 0, "what this command wrote is its to replace"


def test_probabilities_that_are_not_finite_are_one_clear_line(
    classifier: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
):
    model, variables = am.load_pretrained(classifier)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    monkeypatch.setattr(predict, "load_pretrained", lambda _: (model, broken))
    status, output, errors = call(classifier, photos[0], "--json")
    assert (status, output) == (2, "")
    assert f"gives {photos[0]} probabilities that are not finite" in errors


@pytest.mark.parametrize("name", ["grün", "ant\x1b[2J", "\x9b2J", "\udcff", 'a"b', "two\nlines"])
def test_names_reach_neither_a_terminal_nor_json_as_what_they_are_not(name: str):
    record = {"image": f"{name}.png", "overlay": "o.png", "replaced": False, "shares": {name: 1.0}}
    line = predict.as_json(record)
    assert json.loads(line) == record
    assert line.isprintable()
    assert ("grün" in line) == (name == "grün"), "letters are written as they are"
    assert segmentation_predict.describe(record).isprintable()


def test_json_has_no_number_that_json_has_not():
    record = {"image": "a.png", "shares": {"ant": float("nan")}}
    with pytest.raises(UserError, match=r"the record of a\.png has a number that is not finite"):
        predict.as_json(record)


@pytest.mark.parametrize("kind", ["classifier", "segmentor"])
def test_a_picture_shows_where_the_model_looks(
    kind: str, photos: list[str], request: pytest.FixtureRequest
):
    directory = request.getfixturevalue(kind)
    arguments = (directory, photos[0], "--show-offsets", "new/looks.png", "--token", "0.2,0.7")
    status, output, errors = call(*arguments)
    assert (status, errors) == (0, "")
    *others, last = output.splitlines()
    assert photos[0] in "".join(others)  # the usual predictions are printed too
    assert last == f"wrote new/looks.png: where the model looks in {photos[0]}"
    assert call(*arguments)[1].splitlines()[-1] == last.replace("wrote", "replaced")
    (record,) = map(json.loads, call(*arguments, "--json")[1].splitlines())
    assert (record["image"], record["offsets"]) == (photos[0], "new/looks.png")
    card, (model, variables) = am.read_card(directory), am.load_pretrained(directory)
    blocks = am.inspect_offsets(model, variables, photos[0], card)
    seen = show_to_model(model, photos[0], card)[0]
    expected = am.draw_offsets(seen, blocks, [(0.2, 0.7)])
    assert Image.open("new/looks.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("token", ["0.5", "a,b", "0.1,0.2,0.3"])
def test_a_token_is_two_numbers(token: str, classifier: Path, photos: list[str]):
    status, _, errors = call(classifier, photos[0], "--show-offsets", "o.png", "--token", token)
    assert status == 2
    assert f"argument --token: '{token}', expected X,Y such as 0.3,0.6" in errors
