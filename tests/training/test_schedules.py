"""Learning rate schedules: the original's, and a smooth one by steps."""

from typing import Any

import goldens
import jax
import numpy as np
import pytest

from activemlp_jax.training.config import default_config
from activemlp_jax.training.schedules import learning_rate_schedule


def settings(**changes: Any) -> Any:
    config = default_config().optimizer
    config.update(changes)
    return config


@pytest.mark.parametrize("batch_size", [512, 1024])
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
@pytest.mark.usefixtures("float64")
def test_the_epoch_schedule_is_the_originals_in_all_300_epochs(
    batch_size: int, steps_per_epoch: int
):
    golden = goldens.load_json("lr_schedule.json")
    config = settings(
        schedule="epochs",
        # The golden peak is already scaled; ours is scaled by the batch size.
        learning_rate=golden["base_lr"] * 512 / batch_size,
        reference_batch_size=512,
        warmup_learning_rate=golden["warmup_lr"],
        final_learning_rate=golden["min_lr"],
        warmup_epochs=golden["warmup_epochs"],
    )
    schedule = learning_rate_schedule(
        config, steps_per_epoch, golden["epochs"] * steps_per_epoch, batch_size
    )
    ours = jax.vmap(schedule)(np.arange(300 * steps_per_epoch)).reshape(300, steps_per_epoch)
    expected = np.array(golden["lr_during_epoch"])[:, None]
    np.testing.assert_allclose(ours, np.broadcast_to(expected, ours.shape), rtol=1e-12)


def test_the_smooth_schedule_warms_up_then_follows_a_cosine_from_step_zero():
    config = settings(
        learning_rate=1e-3, warmup_learning_rate=1e-6, final_learning_rate=1e-5, warmup_epochs=5
    )
    schedule = learning_rate_schedule(config, steps_per_epoch=10, steps=1000, batch_size=64)
    steps = np.arange(1000)
    warmup = 1e-6 + (1e-3 - 1e-6) * steps / 50
    cosine = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * steps / 1000)) / 2
    expected = np.where(steps < 50, warmup, cosine)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-5)


@pytest.mark.parametrize("precise", [True, False])
def test_the_poly_schedule_is_the_originals_for_segmentation(precise: bool):
    golden = goldens.load_json("seg_lr_schedule.json")
    peak = golden["base_lr"]
    config = settings(
        schedule="poly",
        learning_rate=peak,
        warmup_learning_rate=peak * golden["warmup_ratio"],
        final_learning_rate=0.0,
        warmup_steps=golden["warmup_iters"],
    )
    with jax.enable_x64(precise):
        schedule = learning_rate_schedule(config, 1263, golden["max_iters"], 16)
        for step, expected in golden["lr_at_iteration"].items():
            rate = float(schedule(np.int32(step)))
            assert rate == pytest.approx(expected, rel=1e-9 if precise else 1e-4), f"step {step}"


@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_the_peak_grows_with_the_global_batch_and_the_ends_do_not(kind: str):
    def rates(batch_size: int) -> np.ndarray:
        config = settings(schedule=kind, learning_rate=5e-4, reference_batch_size=512)
        schedule = learning_rate_schedule(config, 10, 1000, batch_size)
        return np.asarray(jax.vmap(schedule)(np.arange(1000)))

    small, large = rates(512), rates(2048)
    np.testing.assert_allclose([small[0], large[0]], 1e-6, rtol=1e-4)
    cosine = (1 + np.cos(np.pi * (20 if kind == "steps" else 19) / 100)) / 2
    for rates_of, peak in ((small, 5e-4), (large, 2e-3)):
        np.testing.assert_allclose(rates_of[200], 1e-5 + (peak - 1e-5) * cosine, rtol=1e-5)
