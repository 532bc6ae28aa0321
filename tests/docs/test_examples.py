"""Examples that no page runs: the batch script, the drawn scenes, and the detector."""

import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT
from small_models import BACKBONE

import activemlp_jax as am
from activemlp_jax.data.sources import open_scenes
from activemlp_jax.training.config import default_config, flatten


@pytest.mark.parametrize(
    ("status", "queued"),
    [(0, ""), (1, ""), (143, "requeue 7\n")],
    ids=["done", "failed", "stopped"],
)
def test_the_script_for_slurm_starts_training_and_queues_again_where_it_was_stopped(
    status: int, queued: str, tmp_path: Path
):
    stand_ins = {"srun": f'printf "%s\\n" "$@" > words; exit {status}', "scontrol": 'echo "$@"'}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "7", "HOME": str(tmp_path)}
    chosen = ["--config", "configs/active_tiny.py", "--workdir", "runs/with spaces"]
    result = subprocess.run(
        ["bash", ROOT / "examples" / "train.sbatch", *chosen],
        cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (status, queued, "")
    option, *words = (tmp_path / "words").read_text().splitlines()
    assert option == "--cpus-per-task=12"
    assert words[2:6] == chosen
    assert words[:2] == [".venv/bin/python", "train.py"]
    keys = {word.partition("=")[0].removeprefix("--config.") for word in words[6:]}
    assert keys <= set(flatten(default_config()))


def test_drawn_shapes_are_scenes_with_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["draw_shapes.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "draw_shapes.py"), run_name="__main__")
    for split, count in (("train", 240), ("val", 40)):
        source = open_scenes(f"folder:{tmp_path}", split)
        assert (len(source), source.class_names[0]) == (count, "background")
        shares = np.mean([np.bincount(source[i].label.ravel(), minlength=4) for i in range(40)], 0)
        assert (shares > 100).all(), f"pixels of each class: {shares}"


def test_a_detector_on_the_pyramid_has_a_box_around_every_place(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.syspath_prepend(ROOT)
    from examples.feature_pyramid import STRIDES, Detector, centers

    model, detector = am.ActiveMLP(**BACKBONE), Detector(num_classes=3, channels=8)
    images = jax.ShapeDtypeStruct((2, 70, 94, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    shapes = jax.eval_shape(partial(model.apply, method="features"), variables, images)
    rest = jax.eval_shape(detector.init, jax.random.key(0), shapes)
    rng = np.random.default_rng(0)
    rest, maps = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) / 9).astype(np.float32), (rest, shapes)
    )

    scores, boxes = map(np.asarray, jax.jit(detector.apply)(rest, maps))
    sides = [leaf.shape[1:3] for leaf in maps[1:]]
    sides += [(2, 2), (1, 1)]  # half the sides of the last map, and a quarter, rounded up
    places = [centers(np.zeros((1, *side, 1)), s) for side, s in zip(sides, STRIDES, strict=True)]
    x, y = np.concatenate(places).T
    assert places[0].max(0).tolist() == [92, 68], "the last place of P3 in an image of 94 x 70"
    assert scores.shape == (2, len(x), 3)
    assert boxes.shape == (2, len(x), 4)
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    for first, middle, last in ((left, x[None], right), (top, y[None], bottom)):
        assert (first < middle).all()
        assert (middle < last).all()
