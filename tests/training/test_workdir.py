"""A run's directory: claimed by one run, rewound on resume, never overwritten by another."""

import json
from pathlib import Path
from typing import Any

import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from activemlp_jax.training.config import RENAMED, check_config, default_config
from activemlp_jax.training.workdir import (
    EPOCHS_FILE,
    STEPS_FILE,
    append_record,
    claim_workdir,
    read_records,
    rewind_records,
)
from activemlp_jax.utils.errors import UserError


def config(**changes: Any) -> Any:
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def claim(directory: Path, config: Any) -> None:
    """Claim a directory, and release it."""
    with claim_workdir(directory, config):
        pass


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_new_directory_is_made_and_holds_the_settings(tmp_path: Path):
    claim(tmp_path / "a" / "b", config(seed=5))
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["seed"] == 5


def test_the_same_run_may_come_back_with_what_does_not_change_its_results(tmp_path: Path):
    claim(tmp_path, config())
    claim(tmp_path, config(**{"tensorboard": True, "data.num_threads": 5}))


@pytest.mark.parametrize("warmup", [False, True])
def test_a_setting_that_a_run_of_an_earlier_version_lacks_has_its_default(
    warmup: bool, tmp_path: Path
):
    claim(tmp_path, config())
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["ema_warmup"]
    path.write_text(json.dumps(settings))
    if warmup:
        with pytest.raises(UserError, match=r"settings: ema_warmup \(False there, True here\)"):
            claim(tmp_path, config(ema_warmup=True))
    else:
        claim(tmp_path, config())


def test_a_run_of_an_earlier_version_may_come_back_with_former_names_of_keys(tmp_path: Path):
    """The keys of `augment` were in `mix`, `random_erasing` and `data`, and AdamW had no name."""
    settings = {
        "augment.flip": 0.25, "augment.crop.min_area": 0.3, "augment.warp.bend": 0.1,
        "augment.mix_group_size": 4, "augment.random_erasing": 0.5, "augment.scene.min_scale": 0.6,
        "augment.rand_augment": "rand-m5", "augment.policy": "random_resized_crop",
    }  # fmt: skip
    claim(tmp_path, config(**settings))
    path = tmp_path / "config.json"
    saved = flatten_dict(json.loads(path.read_text()), sep=".")
    former = {new: old for old, new in RENAMED.items()}
    earlier = {}
    for key, value in saved.items():
        if key != "optimizer.name":
            group = next((name for name in former if f"{key}.".startswith(f"{name}.")), "")
            earlier[former.get(group, "") + key.removeprefix(group)] = value
    assert not [key for key in earlier if key.startswith("augment")]
    assert (earlier["random_erasing"], earlier["mix.group_size"]) == (0.5, 4)
    assert (earlier["data.flip"], earlier["data.crop.min_area"]) == (0.25, 0.3)
    path.write_text(json.dumps(unflatten_dict(earlier, sep=".")))
    with pytest.raises(
        UserError, match=r"settings: augment\.flip \(0\.25 there, 0\.5 here\); give"
    ):
        claim(tmp_path, config(**settings | {"augment.flip": 0.5}))
    claim(tmp_path, config(**settings))
    assert json.loads(path.read_text())["augment"]["flip"] == 0.25


def test_a_directory_of_another_run_is_left_alone_and_every_difference_named(tmp_path: Path):
    claim(tmp_path, config())
    append_record(tmp_path / EPOCHS_FILE, {"epoch": 1, "step": 11})
    before = contents(tmp_path)
    other = config(**{"seed": 1, "model.depths": (2, 2, 4, 2)})
    message = r"other settings: model\.depths .*there.*here.*; seed \(0 there, 1 here\)"
    with pytest.raises(UserError, match=message):
        claim(tmp_path, other)
    assert contents(tmp_path) == before


def test_a_directory_with_someone_elses_files_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match=r"holds files but no config\.json"):
        claim(tmp_path, config())
    assert list(contents(tmp_path)) == [str(tmp_path / "thesis.tex")]


def test_a_config_that_is_no_json_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(UserError, match="not readable as JSON"):
        claim(tmp_path, config())
    assert (tmp_path / "config.json").read_text() == "{oops"


@pytest.mark.parametrize("place", ["file", "below a file", "no such file system"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, place: str):
    file = tmp_path / "file"
    file.write_text("content")
    path = {"file": file, "below a file": file / "run", "no such file system": Path("/proc/run")}
    with pytest.raises(UserError, match=f"{path[place]} cannot be written: "):
        claim(path[place], config())
    assert file.read_text() == "content"


def test_records_after_the_restored_step_are_forgotten(tmp_path: Path):
    assert rewind_records(tmp_path / EPOCHS_FILE, 0) == []
    for epoch in (1, 2, 3):
        append_record(tmp_path / EPOCHS_FILE, {"epoch": epoch, "step": 10 * epoch})
    assert [record["epoch"] for record in rewind_records(tmp_path / EPOCHS_FILE, 20)] == [1, 2]
    append_record(tmp_path / EPOCHS_FILE, {"epoch": 3, "step": 30})
    assert [record["epoch"] for record in read_records(tmp_path / EPOCHS_FILE)] == [1, 2, 3]


def test_a_figure_over_no_examples_is_left_out_of_a_record(tmp_path: Path):
    append_record(tmp_path / EPOCHS_FILE, {"epoch": 1, "step": 10, "test_mean_iou": float("nan")})
    assert read_records(tmp_path / EPOCHS_FILE) == [{"epoch": 1, "step": 10}]


@pytest.mark.parametrize(
    ("end", "epochs"),
    [
        ("", [1]),
        ("{", [1]),
        ('{"epoch": 2, "st', [1]),
        ('{"epoch": 2, "step": 2', [1]),
        ("\0\0\0", [1]),
        ('{"epoch": 2, "step": 20}', [1, 2]),  # a whole record without the end of its line
    ],
)
def test_what_a_kill_left_of_the_last_line_does_not_count(
    end: str, epochs: list[int], tmp_path: Path
):
    path = tmp_path / EPOCHS_FILE
    append_record(path, {"epoch": 1, "step": 10})
    with path.open("a") as file:
        file.write(end)
    assert [record["epoch"] for record in rewind_records(path, 20)] == epochs
    append_record(path, {"epoch": 3, "step": 30})
    assert [record["epoch"] for record in read_records(path)] == [*epochs, 3]


NO_RECORDS = {
    "no JSON": (b"oops", "is not readable as JSON"),
    "an empty line": (b"", "is not readable as JSON"),
    "another bracket": (b'{"epoch": 2, "step": 20]', "is not readable as JSON"),
    "a list": (b'["epoch", "step"]', "expected an object"),
    "no step": (b'{"epoch": 2}', "it has no step"),
    "no epoch": (b'{"step": 20}', "it has no epoch"),
    "a string for a step": (b'{"epoch": 2, "step": "20"}', "step is '20', expected a number"),
    "half a step": (b'{"epoch": 2, "step": 20.5}', "step is 20.5, expected a number"),
    "a negative step": (b'{"epoch": 2, "step": -1}', "step is -1, expected 0 to"),
    "a list for a loss": (b'{"epoch": 2, "step": 20, "loss": []}', r"loss is \[\], expected"),
    "NaN": (b'{"epoch": 2, "step": 20, "loss": NaN}', "is not readable as JSON"),
    "no UTF-8": (b'{"epoch": 2, "st\xffep": 20}', "is not readable as JSON"),
    "deep": (b'{"epoch": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested 10000 levels deep"),
    "long": (b'"' + b"x" * 2**24 + b'"', "expected at most 16,777,216"),
}


@pytest.mark.parametrize("place", ["first", "middle", "last", "last without its end"])
@pytest.mark.parametrize("kind", NO_RECORDS)
def test_a_line_that_is_no_record_is_named_and_nothing_is_forgotten(
    kind: str, place: str, tmp_path: Path
):
    line, message = NO_RECORDS[kind]
    good = [json.dumps({"epoch": epoch, "step": 10 * epoch}).encode() for epoch in (1, 3)]
    number = {"first": 0, "middle": 1}.get(place, 2)
    if place == "last without its end" and kind in ("an empty line", "another bracket"):
        return  # a kill may leave such a last line
    content = b"\n".join([*good[:number], line, *good[number:]])
    (tmp_path / EPOCHS_FILE).write_bytes(content + b"\n" * (place != "last without its end"))
    before = contents(tmp_path)
    expected = rf"{EPOCHS_FILE}, line {number + 1} .*{message}"
    with pytest.raises(UserError, match=expected) as error:
        rewind_records(tmp_path / EPOCHS_FILE, 30)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_file_of_records_that_is_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / STEPS_FILE).open("wb") as file:
        file.truncate(2**40)
    message = rf"{STEPS_FILE} has 1,099,511,627,776 bytes, expected at most"
    with pytest.raises(UserError, match=message):
        rewind_records(tmp_path / STEPS_FILE, 30)


def test_a_directory_in_use_by_a_live_run_is_left_alone(tmp_path: Path):
    with claim_workdir(tmp_path, config()):
        before = contents(tmp_path)
        with pytest.raises(UserError, match="is in use by a run that is alive"):
            claim(tmp_path, config())
        assert contents(tmp_path) == before
    claim(tmp_path, config())


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"seed":' + "[" * 100_000])
def test_a_config_json_that_is_none_is_refused(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is no"):
        claim(tmp_path, config())


def test_a_kill_while_the_directory_was_claimed_does_not_block_it(tmp_path: Path):
    for name in (".config.json.partial", "config.json.partial"):  # the last is an earlier version's
        (tmp_path / name).write_text("{")
    claim(tmp_path, config())
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.resize_factor": 0.5}, r"config\.data\.resize_factor is 0\.5, expected at least 1"),
        ({"data.test_split": ""}, r"config\.data\.test_split is .., expected the name of a split"),
        ({"data.image_size": 31}, r"config\.data\.image_size is 31, expected at least 32"),
        ({"model.depths": (2, 2, 1, 2)}, r"config\.model: depths is .*stage 2 has 1 block"),
        ({"model.share_dims": (2, 5, 4, 8)}, r"64 channels of stage 1.*share_dims value 5"),
        ({"model.dtype": "float16"}, r"config\.model\.dtype is 'float16', expected one of"),
        ({"batch_size": 0}, r"config\.batch_size is 0, expected at least 1"),
        ({"ema_decay": 1.0}, r"config\.ema_decay is 1\.0"),
        ({"epochs": -1}, r"config\.epochs is -1"),
        ({"optimizer.learning_rate": 0.0}, r"learning_rate is 0\.0, expected more than 0"),
        ({"optimizer.learning_rate": float("inf")}, r"config\.optimizer\.learning_rate is inf"),
        ({"optimizer.weight_decay": -1.0}, r"config\.optimizer\.weight_decay is -1\.0"),
        ({"optimizer.b1": 1.0}, r"config\.optimizer\.b1 is 1\.0, expected less than 1"),
        ({"optimizer.name": "lion"}, r"config\.optimizer\.name is 'lion', expected one of adamw"),
        ({"data.mean": (0.5,)}, r"config\.data\.mean is \(0\.5,\), expected three numbers"),
        ({"data.std": (0.2, 0.0, 0.2)}, r"config\.data\.std is .*expected three numbers above 0"),
        ({"augment.warp.bend": -0.1}, r"augment\.warp\.bend is -0\.1, expected at least 0"),
        ({"model.mlp_ratios": (0.01, 4.0, 4.0, 4.0)}, r"stage 0 .* no hidden channels"),
        ({"mesh.fsdp": 0}, r"config\.mesh\.fsdp is 0, expected at least 1"),
        ({"mesh.data": 0}, r"config\.mesh\.data is 0, expected -1 or at least 1"),
        ({"accumulation": 0}, r"config\.accumulation is 0, expected at least 1"),
        ({"model.remat_stages": (4,)}, r"remat_stages is \(4,\), expected stages from 0 to 3"),
        ({"model.dtype": "float64"}, r"dtype is float64, which needs JAX_ENABLE_X64=1"),
        ({"seed": 2**40}, r"config\.seed is 1099511627776, expected at most 4,294,967,295"),
    ],
)
def test_settings_that_cannot_work_are_named_before_any_work(changes: Any, message: str):
    with pytest.raises(UserError, match=message):
        check_config(config(**changes))
