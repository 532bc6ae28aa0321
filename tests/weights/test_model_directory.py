"""Model directories are written whole or not at all; errors in reading name what is wrong."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import goldens
import jax
import numpy as np
import pytest
from damage import single_bit_flips

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.segmentor import variant_name
from activemlp_jax.training import results
from activemlp_jax.utils.digests import DIGESTS, write_digests
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights import model_directory
from activemlp_jax.weights.model_card import ModelCard, check_classes
from activemlp_jax.weights.model_directory import read_card, read_weights, write_model

MODEL = am.ActiveMLP(**goldens.MICRO)


class Task(NamedTuple):
    """The fields of a task that writing a model directory reads."""

    model: am.ActiveMLP
    preprocessing: Preprocessing
    name: str = "classification"


NAMES = tuple("abcdefghij")


def variables(seed: int) -> Any:
    return jax.tree.map(np.asarray, goldens.rule_variables(MODEL, seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model directory with both kinds of weights."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    preprocessing = Preprocessing(64, 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    card = ModelCard(MODEL, preprocessing, ("ema", "model"), "ema", NAMES, {"epoch": 3})
    with write_directory_aside(directory) as place:
        write_model(place, card, {"ema": variables(1), "model": variables(2)})
    return directory


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def assert_same(ours: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)


def test_the_card_says_all_that_was_written(written: Path):
    card = read_card(written)
    assert card.model == MODEL
    assert card.preprocessing == Preprocessing(64, 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.kinds, card.default_kind) == (("ema", "model"), "ema")
    assert (card.class_names, card.source) == (NAMES, {"epoch": 3})
    assert card.name is None


def test_published_variants_are_known_by_name():
    for name in am.list_models():
        assert variant_name(am.create_model(name, num_classes=7, drop_path_rate=0.2)) == name
        assert variant_name(am.create_segmentor(name, num_classes=7, drop_path_rate=0.2)) == name


def test_weights_are_read_back_bit_for_bit(written: Path):
    card = read_card(written)
    assert_same(read_weights(written, card, "ema"), variables(1))
    assert_same(read_weights(written, card, "model"), variables(2))


@pytest.mark.parametrize(("weights", "seed"), [("auto", 1), ("ema", 1), ("model", 2)])
def test_load_pretrained_gives_a_model_and_its_weights(written: Path, weights: str, seed: int):
    model, found = am.load_pretrained(written, weights)
    assert model == MODEL
    assert_same(found, variables(seed))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("head", goldens.SEG_MICRO)
def test_a_segmentation_model_is_read_back_with_its_statistics(head: str, tmp_path: Path):
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head])
    expected = jax.tree.map(np.asarray, goldens.rule_variables(model))
    preprocessing = ScenePreprocessing(0, 96, 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    card = ModelCard(model, preprocessing, ("model",), "model", NAMES[:7], {"epoch": 3})
    with write_directory_aside(tmp_path / "scenes") as place:
        write_model(place, card, {"model": expected})
    again = read_card(tmp_path / "scenes")
    assert again == card
    assert again.task == "segmentation"
    found, weights = am.load_pretrained(tmp_path / "scenes")
    assert found == model
    assert set(weights) == {"params", "batch_stats"}
    assert_same(weights, expected)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, weights)
    assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, expected)


def rewrite(directory: Path, **changes: Any) -> None:
    """Change model.json, and update the digests to match."""
    path = directory / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_digests(directory)


SIZES = {"depths": [2, 2, 2, 2], "embed_dims": [8] * 4, "mlp_ratios": [2] * 4}
SIZES |= {"share_dims": [2] * 4, "offset_interval": 2}
IMAGES = {"image_size": 64, "resize_factor": 1.25, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, r"format is 1, expected 2"),
        ({"task": 7}, r"task is 7, expected a name"),
        ({"task": "two words"}, r"task is 'two words', expected a name"),
        ({"architecture": {"backbone": {}}}, r"architecture has no head, channels"),
        ({"source": []}, r"source is \[\], expected an object"),
        ({"classes": None}, r"classes is None, expected an object"),
        ({"classes": {"number": 10}}, r"classes has no names"),
        (
            {"classes": {"number": True, "names": None}},
            r"classes\.number is True, expected a number",
        ),
        (
            {"classes": {"number": 10**9, "names": None}},
            r"classes\.number is 10+, expected 1 to 1,0",
        ),
        (
            {"classes": {"number": 2, "names": ["cat", 5]}},
            r"names is \['cat', 5\], expected a list",
        ),
        ({"classes": {"number": 2, "names": "ab"}}, r"names is 'ab', expected a list of names"),
        ({"classes": {"number": 2, "names": ["cat"]}}, r"1 names for 2 classes"),
        ({"weights": {"kinds": ["model"], "default": "ema"}}, r"'ema' are the default, but there"),
        (
            {"weights": {"kinds": ["../../x"], "default": "../../x"}},
            r"kinds is \['../../x'\], expec",
        ),
        ({"weights": {"kinds": [["ema"]], "default": "ema"}}, r"kinds is \[\['ema'\]\], expected"),
        ({"weights": {"kinds": "ema", "default": "ema"}}, r"kinds is 'ema', expected a list"),
        ({"architecture": {"depths": [2, 2]}}, r"architecture has no embed_dims, mlp_ratios"),
        ({"architecture": SIZES | {"widths": 5}}, r"architecture has 'widths', which is unknown"),
        *(
            ({"architecture": SIZES | {field: value}}, message)
            for field, value, message in (
                ("depths", [2, 2], r"depths is \[2, 2\], expected four numbers"),
                ("depths", [2, 2, 2, 100_000], r"depths is 100000, expected 0 to 500"),
                ("depths", [2, 2, 2, 10**9], r"depths is 1000000000, expected 0 to 500"),
                ("depths", [200, 200, 200, 200], r"depths is 800, expected 0 to 500"),
                ("depths", [2, 2, 2, 2.5], r"depths is 2\.5, expected a number"),
                ("depths", [2, 2, 2, 1], r"stage 3 has 1 block, expected at least 2"),
                ("embed_dims", [2**20] * 4, r"embed_dims is 1048576, expected 0 to 65,536"),
                ("share_dims", [0, 2, 2, 2], r"share_dims is \(0, 2, 2, 2\), expected positive"),
                ("mlp_ratios", [1e30] * 4, r"mlp_ratios is 1e\+30, expected 0 to 64"),
                ("mlp_ratios", ["4"] * 4, r"mlp_ratios is '4', expected a number"),
                ("offset_interval", 10**18, r"offset_interval is 10+, expected 1 to"),
                ("offset_interval", "2", r"offset_interval is '2', expected a number"),
            )
        ),
        *(
            ({"preprocessing": IMAGES | {field: value}}, message)
            for field, value, message in (
                ("image_size", 3, r"image_size is 3, expected at least 32"),
                ("image_size", 10**5, r"image_size is 100000, expected at most 4,096"),
                ("image_size", "64", r"image_size is '64', expected at least 32"),
                ("resize_factor", 1e30, r"resize_factor is 1e\+30, expected at most 4"),
                ("mean", [], r"mean is \(\), expected three numbers"),
                ("mean", 0.5, r"mean is 0\.5, expected three numbers"),
                ("mean", [1e9] * 3, r"mean is .*, expected three numbers up to 1000"),
                ("mean", ["a"] * 3, r"mean is .*, expected three numbers"),
                ("std", [1e-300] * 3, r"std is .*, expected three numbers above 0"),
                ("window", 64, r"preprocessing has 'window', which is unknown"),
            )
        ),
    ],
)
def test_a_card_that_is_wrong_is_named(copied: Path, changes: Any, message: str):
    rewrite(copied, **changes)
    expected = rf"/model\.json is not a model description: .*{message}"
    with pytest.raises(UserError, match=expected) as error:
        read_card(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", "is not readable as JSON"),
        ("[]", "it is \\[\\], expected an object"),
        ("{}", "it has no format, task"),
        ("[" * 100_000, "nested 100000 levels deep"),
        ('{"format": NaN}', "NaN is not a number of JSON"),
        ('{"mean": 1e400}', "the number 1e400 is not finite"),
        ('{"mean": 1' + "0" * 400 + "}", "a number has 401 digits"),
        ('{"format": "\xff"}', "is not readable as JSON"),
    ],
)
def test_a_file_that_is_no_card_is_named(copied: Path, text: str, message: str):
    (copied / "model.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"model\.json .*{message}"):
        read_card(copied)


def test_a_card_of_other_classes_than_the_weights_is_named(copied: Path):
    rewrite(copied, classes={"number": 7, "names": None})
    with pytest.raises(UserError, match=r"2 parameters differ; head/\w+ is"):
        am.load_pretrained(copied)


def test_no_flipped_bit_of_a_model_directory_is_used(copied: Path):
    for flip in single_bit_flips(copied, 200):
        with pytest.raises(UserError) as error:
            am.load_pretrained(copied)
        assert str(copied) in str(error.value), flip
        assert "\n" not in str(error.value), flip
    am.load_pretrained(copied)


def test_a_card_that_was_changed_on_purpose_is_used_once_its_digest_is_gone(copied: Path):
    path = copied / "model.json"
    path.write_text(path.read_text().replace('"epoch": 3', '"epoch": 4'))
    message = rf"if you changed it on purpose, remove its line from {copied}/{DIGESTS}$"
    with pytest.raises(UserError, match=message):
        read_card(copied)
    lines = (copied / DIGESTS).read_text().splitlines(keepends=True)
    (copied / DIGESTS).write_text("".join(line for line in lines if "model.json" not in line))
    assert read_card(copied).source == {"epoch": 4}
    am.load_pretrained(copied)


def test_a_directory_of_an_earlier_version_has_no_digests_and_is_used(copied: Path):
    (copied / DIGESTS).unlink()
    assert_same(am.load_pretrained(copied)[1], variables(1))


def test_the_digests_are_those_of_sha256sum(written: Path):
    command = ["sha256sum", "--check", "--strict", "--quiet", DIGESTS]
    subprocess.run(command, cwd=written, check=True)
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    listed = {line.split("  ")[1] for line in (written / DIGESTS).read_text().splitlines()}
    assert listed == files - {DIGESTS}


def test_weights_that_are_not_finite_are_not_used(tmp_path: Path):
    weights = variables(1)
    bias = np.array(weights["params"]["head"]["bias"])
    bias[:3] = np.nan, np.inf, -np.inf
    weights["params"]["head"]["bias"] = bias
    card = ModelCard(MODEL, Preprocessing(), ("model",), "model")
    with write_directory_aside(tmp_path / "model") as place:
        write_model(place, card, {"model": weights})
    message = r"weights/model cannot be used: 3 of 10 values of params/head/bias are not finite"
    with pytest.raises(UserError, match=message):
        am.load_pretrained(tmp_path / "model")


def write_result(directory: Path) -> None:
    """Write a model directory in the same way as training."""
    task = Task(MODEL, Preprocessing())
    results.write_result(directory, task, {"model": variables(2)}, NAMES, {})  # type: ignore[arg-type]


def test_a_link_is_replaced_and_what_it_leads_to_stays(written: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    (tmp_path / "model").symlink_to(written)
    write_result(tmp_path / "model")
    assert not (tmp_path / "model").is_symlink()
    assert read_card(tmp_path / "model").kinds == ("model",)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.mark.parametrize("limit", [100, 50_000], ids=["at the first file", "at the arrays"])
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    limit: int, copied: Path, full_disk: Any, caplog: pytest.LogCaptureFixture
):
    message = r"no model can be written in .*File too large"
    with pytest.raises(UserError, match=message) as error, full_disk(limit):
        write_result(copied)
    assert "\n" not in str(error.value)
    assert not caplog.records, "orbax logs tracebacks"
    assert_same(am.load_pretrained(copied)[1], variables(1))
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_what_an_interrupted_write_left_is_gone_after_the_next(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_directory, "write_digests", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_result(copied)
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]
    (copied.parent / ".copied.partial" / "weights").mkdir(parents=True)  # as after SIGKILL
    write_result(copied)
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_directory_whose_replacement_was_cut_short_is_named_and_restored(copied: Path):
    previous = copied.with_name(".copied.previous")
    copied.rename(previous)  # as after a kill between the two renames
    with pytest.raises(UserError, match=f"a kill cut short its replacement; .* is {previous}$"):
        read_card(copied)
    assert_same(am.load_pretrained(previous)[1], variables(1))
    write_result(copied)
    assert_same(am.load_pretrained(copied)[1], variables(2))
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_replacement_that_fails_leaves_what_was_there(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == copied and source.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="copied cannot be written: No space left on device"):
        write_result(copied)
    assert_same(am.load_pretrained(copied)[1], variables(1))
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_what_is_no_model_directory_is_told_apart(copied: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    copied.rename(tmp_path / "run" / "model")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    for name, message in (
        ("nothing", "there is no such folder"),
        ("weights.pth", r"it is a file; convert_torch_weights\.py makes a model directory from"),
        ("run", f"it is the workdir of a run; the run's model is {tmp_path}/run/model"),
        ("run/model/weights", r"it has no model\.json; convert_torch_weights\.py and train\.py"),
    ):
        with pytest.raises(UserError, match=f"{name} is not a model directory: {message}"):
            am.load_pretrained(tmp_path / name)


@pytest.mark.parametrize("names", [NAMES, None])
def test_another_number_of_classes_is_said_to_be_the_data_sets(names: tuple[str, ...] | None):
    card = ModelCard(MODEL, Preprocessing(), ("model",), "model", names)
    message = "^folder:pets has 2 classes, but the model has 10; fine-tune it on them first$"
    with pytest.raises(UserError, match=message):
        check_classes(card, ("cat", "dog"), "folder:pets")


def test_a_directory_that_is_incomplete_is_named(copied: Path):
    with pytest.raises(UserError, match=r"copied has no 'average' weights, only 'ema', 'model'"):
        am.load_pretrained(copied, "average")
    shutil.rmtree(copied / "weights" / "ema")
    with pytest.raises(UserError, match=r"weights/ema cannot be read"):
        am.load_pretrained(copied)
    for file in (copied / "weights" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"weights/model cannot be read"):
        am.load_pretrained(copied, "model")
