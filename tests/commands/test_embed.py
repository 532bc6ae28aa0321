"""`python -m activemlp_jax.embed`: a file with a row of features for every image."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import run_main
from pyarrow import parquet
from small_models import save_classifier, save_photos, save_segmentor

import activemlp_jax as am
from activemlp_jax import embed
from activemlp_jax.inference import classify
from activemlp_jax.utils.errors import install_command

pytestmark = pytest.mark.xdist_group("predict")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small batches, which compile faster; five photos need two of them."""
    monkeypatch.setattr(classify, "BATCH_SIZES", (4,))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Save photos in two class folders of the working directory; return their relative paths."""
    monkeypatch.chdir(tmp_path)
    names = ("val/cat/0.png", "val/cat/1.png", "val/cat/2.png", "val/dog/0.png", "val/dog/1.jpg")
    return [str(file) for file in save_photos(Path(), *names)]


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its status, output and errors."""
    result = run_main(embed.main, *arguments)
    return result.returncode, result.stdout, result.stderr


def expected_rows(classifier: Path, files: list[str]) -> np.ndarray:
    card, (model, variables) = am.read_card(classifier), am.load_pretrained(classifier)
    return am.embed_images(model, variables, files, card)


def test_a_folder_becomes_names_in_it_and_a_row_for_each(classifier: Path, photos: list[str]):
    status, output, errors = call(classifier, "val", "--output", "new/features.npz")
    assert (status, errors) == (0, "")
    assert output == "wrote new/features.npz: 5 images, 16 numbers each\n"
    with np.load("new/features.npz") as arrays:
        assert sorted(arrays) == ["embeddings", "names"]
        names, rows = arrays["names"], arrays["embeddings"]
    assert [f"val/{name}" for name in names] == photos
    assert (rows.shape, rows.dtype) == ((5, 16), np.float32)
    np.testing.assert_allclose(rows, expected_rows(classifier, photos), atol=1e-5)
    assert np.ptp(rows, axis=0).max() > 0.1, "photos differ"
    assert [file.name for file in Path("new").iterdir()] == ["features.npz"]
    _, output, _ = call(classifier, "val/dog", "--output", "new/features.npz")
    assert output == "replaced new/features.npz: 2 images, 16 numbers each\n"
    link = Path("new/link.npz")
    link.symlink_to("features.npz")
    before = Path("new/features.npz").read_bytes()
    assert call(classifier, "val/dog", "--output", link)[0] == 0
    assert not link.is_symlink(), "a link is replaced, not followed"
    assert Path("new/features.npz").read_bytes() == before


def test_parquet_has_the_same_and_several_paths_keep_their_names(
    classifier: Path, photos: list[str]
):
    status, _, errors = call(classifier, "val/dog", "val/cat/*", "--output", "features.parquet")
    assert (status, errors) == (0, "")
    table = parquet.read_table("features.parquet")
    assert table.column_names == ["name", "embedding"]
    expected = [*photos[3:], *photos[:3]]
    assert table["name"].to_pylist() == expected
    rows = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(rows, expected_rows(classifier, expected), atol=1e-5)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[16]"


def test_an_image_that_cannot_be_read_has_no_row(classifier: Path, photos: list[str]):
    Path(photos[1]).write_bytes(b"nothing")
    status, output, errors = call(classifier, "val/cat", "--output", "features.npz")
    assert status == 1
    assert errors == "skipped: val/cat/1.png is not a readable image: no known format\n"
    assert "2 images" in output
    with np.load("features.npz") as arrays:
        assert list(arrays["names"]) == ["0.png", "2.png"]
        rows = expected_rows(classifier, [photos[0], photos[2]])
        np.testing.assert_allclose(arrays["embeddings"], rows, atol=1e-5)


def test_features_that_are_not_finite_and_a_full_disk_leave_no_file(
    classifier: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
):
    model, variables = am.load_pretrained(classifier)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "load_pretrained", lambda _: (model, broken))
        status, output, errors = call(classifier, "val/dog", "--output", "new/features.npz")
    assert (status, output) == (2, "")
    assert "gives 0.png features that are not finite" in errors

    def full(file: Any, *_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(embed.WRITERS, ".npz", full)
    status, output, errors = call(classifier, "val/dog", "--output", "new/features.npz")
    assert (status, output) == (2, "")
    assert errors == "command: error: new/features.npz: No space left on device\n"
    assert not list(Path("new").glob("*")), f"{photos} alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL", "val", "--output", "features.csv"), "expected a name that ends in .npz or"),
        (("MODEL", "val", "--output", "folder.npz"), "folder.npz cannot be written: it is a"),
        (("MODEL", "nowhere", "--output", "a.npz"), "there is no file or folder nowhere"),
        (("MODEL", "bad.png", "--output", "a.npz"), "none of the 1 images can be read; a.npz"),
        (("MODEL", "val", "--output", "bad.png/a.npz"), "a.npz cannot be written: bad.png is no"),
        (("SEGMENTOR", "val", "--output", "a.npz"), "has a segmentation model, which sees"),
        (("val", "val", "--output", "a.npz"), "val is not a model directory"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("photos")
def test_what_cannot_work_is_one_clear_line(
    arguments: tuple[str, ...], message: str, classifier: Path, tmp_path: Path
):
    Path("folder.npz").mkdir()
    Path("bad.png").write_bytes(b"nothing")
    places = {"MODEL": classifier}
    if arguments[0] == "SEGMENTOR":
        places["SEGMENTOR"] = save_segmentor(tmp_path / "segmentor")
    status, output, errors = call(*[places.get(argument, argument) for argument in arguments])
    assert (status, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert len(errors.splitlines()) == 1 + ("bad.png" in arguments)
    assert not Path("a.npz").exists()


@pytest.mark.usefixtures("photos")
def test_where_pyarrow_is_missing_parquet_says_how_to_get_it(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    status, _, errors = call(classifier, "val", "--output", "features.parquet")
    assert status == 2
    assert f"Parquet files need pyarrow: {install_command('parquet')}" in errors
