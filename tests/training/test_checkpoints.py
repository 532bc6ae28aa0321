"""Checkpoints hold the whole state at the save, while training goes on."""

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import single_bit_flips
from ml_collections import ConfigDict
from toy_task import ToyTask

from activemlp_jax.distributed import sharding
from activemlp_jax.training.checkpoints import Best, Checkpoints
from activemlp_jax.training.config import default_config
from activemlp_jax.training.step import TrainState, make_train_step
from activemlp_jax.utils.digests import DIGESTS
from activemlp_jax.utils.errors import UserError

OPTIMIZER = optax.adam(0.1)
EVERYWHERE = sharding.replicated(sharding.make_mesh())


def config(**changes: Any) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def shapes() -> TrainState:
    """Make the shapes of a state whose arrays are replicated on every device."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=EVERYWHERE),
        jax.eval_shape(new_state),
    )


def new_state() -> TrainState:
    params = {"large": jnp.ones((512, 512)), "small": jnp.arange(3.0)}
    return TrainState.create({"params": params}, OPTIMIZER, ema_decay=0.9)


@pytest.mark.parametrize("steps_after", [0, 50])
def test_a_state_comes_back_as_it_was_at_the_save(tmp_path: Path, steps_after: int):
    def loss(variables: dict[str, Any], *_: object) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(variables["params"])), {}

    # Donation lets the next step write into the buffers that are being saved.
    rate = optax.constant_schedule(0.1)
    settings = config(ema_decay=0.9)
    train_step = make_train_step(ToyTask(loss), OPTIMIZER, rate, settings, sharding.make_mesh())
    step = jax.jit(train_step, donate_argnums=0)
    state, _ = step(new_state(), {})
    saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path, config()) as checkpoints:
        checkpoints.save(state, 1, [0.1, 0.2])
        for _ in range(steps_after):
            state, _ = step(state, {})
    with Checkpoints(tmp_path, config()) as checkpoints:
        restored = checkpoints.restore(shapes())
    assert restored is not None
    assert restored.losses == [0.1, 0.2]
    for ours, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_an_empty_directory_has_no_state(tmp_path: Path):
    with Checkpoints(tmp_path, config()) as checkpoints:
        assert checkpoints.restore(shapes()) is None
        assert checkpoints.best() is None
        assert checkpoints.newest(below=10) is None


def save_all(directory: Path, accuracies: Sequence[float | None], **changes: Any) -> set[str]:
    """Save at steps 1, 2 and so on; return the names of the checkpoints that are kept."""
    with Checkpoints(directory, config(**changes)) as checkpoints:
        for step, accuracy in enumerate(accuracies, 1):
            state = new_state().replace(step=jnp.asarray(step))
            checkpoints.save(state, step, [], accuracy)
            checkpoints.wait()
    return {path.name for path in directory.iterdir() if path.name.isdigit()}


def test_only_the_newest_are_kept(tmp_path: Path):
    assert save_all(tmp_path, [None] * 4) == {"3", "4"}


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    accuracies = (70.0, 90.0, None, 80.0, 85.0, None)
    assert save_all(tmp_path, accuracies, **{"checkpoint.keep": 1}) == {"2", "6"}
    with Checkpoints(tmp_path, config()) as checkpoints:
        assert checkpoints.best() == Best(2, 90.0)
        assert checkpoints.newest(below=6) == tmp_path / "2"
        best = checkpoints.restore(shapes(), 2)
    assert best is not None
    assert int(best.state.step) == 2


def test_a_score_over_no_examples_is_none(tmp_path: Path):
    save_all(tmp_path / "checkpoints", [float("nan")])
    with Checkpoints(tmp_path / "checkpoints", config()) as checkpoints:
        assert checkpoints.best() is None


def test_every_setting_that_differs_is_named(tmp_path: Path):
    save_all(tmp_path, [None])
    other = config(**{"seed": 1, "model.depths": (2, 2, 4, 2)})
    message = r"/1 is of a run with other settings: model\.depths .*; seed \(0 there, 1 here\)"
    with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(shapes())


def test_a_checkpoint_that_cannot_be_read_is_named_and_stays(tmp_path: Path):
    save_all(tmp_path, [None])
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with (
        Checkpoints(tmp_path, config()) as checkpoints,
        pytest.raises(UserError, match=r"/1 cannot be read: .*; remove it to go on from"),
    ):
        checkpoints.restore(shapes())
    assert (tmp_path / "1").exists()


def restore(directory: Path) -> int:
    """Return the step from which a run would resume."""
    with Checkpoints(directory, config()) as checkpoints:
        restored = checkpoints.restore(shapes())
    assert restored is not None
    return int(restored.state.step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save three checkpoints, of which the oldest is the best."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    assert save_all(directory, [80.0, None, 70.0]) == {"1", "2", "3"}
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """Copy the directory `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_no_flipped_bit_of_a_checkpoint_is_restored(directory: Path):
    """A flipped bit in any file is found; the error names this and the newest good checkpoint."""
    message = rf"/3 cannot be read: .*; remove it to go on from {directory}/2$"
    expected = shapes()
    with Checkpoints(directory, config()) as checkpoints:
        for flip in single_bit_flips(directory / "3", 200):
            with pytest.raises(UserError) as error:
                checkpoints.restore(expected)
            assert re.search(message, str(error.value)), flip
        assert checkpoints.restore(expected) is not None


def test_a_flipped_bit_of_an_older_checkpoint_is_found_before_training(directory: Path):
    """This matters because a run reads its best checkpoint after the last step."""
    message = rf"/1 cannot be read: .*; remove it to go on from {directory}/3$"
    expected = shapes()
    with Checkpoints(directory, config()) as checkpoints:
        for flip in single_bit_flips(directory / "1" / "state", 50):
            with pytest.raises(UserError) as error:
                checkpoints.restore(expected)
            assert re.search(message, str(error.value)), flip


@pytest.mark.parametrize("left", [("run", "state"), (DIGESTS, "metrics"), ("state",)])
def test_what_a_kill_left_of_an_old_checkpoint_is_not_missed(left: Sequence[str], directory: Path):
    for path in (directory / "1").iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert restore(directory) == 3


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_is_restored(directory: Path):
    (directory / "3" / DIGESTS).unlink()
    assert restore(directory) == 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics/metrics", ""),
        ("metrics/metrics", "[]"),
        ("metrics/metrics", '{"score": "high"}'),
        ("run/metadata", "{}"),
        ("run/metadata", "[" * 100_000),
        ("run/metadata", '{"config": 5, "losses": []}'),
        ("run/metadata", '{"config": {}, "losses": 5}'),
        ("state/_METADATA", "[]"),
        ("state/_METADATA", '{"tree_metadata": 5}'),
        ("state/_METADATA", "{}"),
        (DIGESTS, "0123  state/_METADATA"),
        (DIGESTS, f"{'0' * 64}  /dev/zero"),
        (DIGESTS, f"{'0' * 64}  ../2/state/_METADATA"),
    ],
)
def test_a_damaged_record_of_a_checkpoint_without_digests_is_named_in_one_line(
    file: str, content: str, directory: Path
):
    (directory / "3" / DIGESTS).unlink()
    (directory / "3" / file).write_text(content)
    message = rf"^{directory}/3 cannot be read: .*; remove it to go on from {directory}/2$"
    with pytest.raises(UserError, match=message) as error:
        restore(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "{"])
def test_a_damaged_record_of_an_older_checkpoint_is_named_before_training(
    content: str, directory: Path
):
    (directory / "1" / DIGESTS).unlink()
    (directory / "1" / "run" / "metadata").write_text(content)
    with pytest.raises(UserError, match=r"/1 cannot be read: .*run/metadata is not"):
        restore(directory)


def test_weights_that_are_not_finite_are_not_gone_on_from(directory: Path):
    broken = new_state().replace(step=jnp.asarray(4))
    broken.variables["params"]["large"] = jnp.ones((512, 512)).at[1, :3].set(jnp.nan)
    with Checkpoints(directory, config()) as checkpoints:
        checkpoints.save(broken, 4, [])
    values = "3 of 262,144 values of variables/params/large are not finite"
    with pytest.raises(UserError, match=rf"/4 cannot be read: {values}; remove it to .*/3$"):
        restore(directory)


def test_a_checkpoint_that_does_not_fit_is_one_line(
    directory: Path, full_disk: Any, caplog: pytest.LogCaptureFixture
):
    def save() -> None:
        with Checkpoints(directory, config()) as checkpoints, full_disk(300):
            checkpoints.save(new_state(), 4, [])
            checkpoints.wait()

    whole = rf"File too large.*; the newest whole one is {directory}/3$"
    with pytest.raises(UserError, match=whole) as error:
        save()
    assert "\n" not in str(error.value)
    assert not caplog.records, "orbax logs tracebacks"
    assert restore(directory) == 3


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)


def unmount(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("lose", [empty, unmount, shutil.rmtree])
def test_records_whose_checkpoints_are_lost_are_no_beginning(
    lose: Callable[[Path], None], tmp_path: Path
):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory, config()) as checkpoints:
        checkpoints.begin(has_records=False)
    save_all(directory, [None])
    lose(directory)
    with Checkpoints(directory, config()) as checkpoints:
        with pytest.raises(UserError, match="has lost its checkpoints; is its disk mounted"):
            checkpoints.begin(has_records=True)
        checkpoints.begin(has_records=False)  # the records were removed, as the message says


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path):
    directory = tmp_path / "checkpoints"
    for has_records in (False, True, True):
        with Checkpoints(directory, config()) as checkpoints:
            assert checkpoints.restore(shapes()) is None
            checkpoints.begin(has_records)
        deadline = time.monotonic() + 60  # orbax cleans up in another thread
        while list(directory.glob("*-tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for name in ("1.orbax-checkpoint-tmp", "1.written.orbax-checkpoint-tmp"):
            (directory / name).mkdir()  # left by the kill
    assert save_all(directory, [None]) == {"1"}
    assert {path.name for path in directory.iterdir()} == {"1"}


def test_checkpoints_are_due_by_number_or_by_the_clock(tmp_path: Path):
    with Checkpoints(tmp_path / "a", config(**{"checkpoint.every_steps": 3})) as checkpoints:
        assert [step for step in range(1, 10) if checkpoints.is_due(step)] == [3, 6, 9]
    with Checkpoints(tmp_path / "b", config()) as checkpoints:
        assert not any(checkpoints.is_due(step) for step in range(1, 100))
    minutes = config(**{"checkpoint.every_minutes": 0.005})
    with Checkpoints(tmp_path / "c", minutes) as checkpoints:
        assert not checkpoints.is_due(1)
        time.sleep(0.35)
        assert checkpoints.is_due(2)
        checkpoints.save(new_state(), 2, [])
        assert not checkpoints.is_due(3)
