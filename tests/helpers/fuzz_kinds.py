"""Makers of valid inputs of every kind that commands read, and their readers."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import goldens
import jax
import jax.numpy as jnp
import optax
import torch
from pictures import photo, save_photos
from rich.console import Console
from small_models import CLASSIFIER, NAMES, PREPROCESSING, save_classifier, save_segmentor
from tensorflow_datasets.core import constants

from activemlp_jax.data.preparation import prepare_folder
from activemlp_jax.data.sources import open_source
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.images import read_image
from activemlp_jax.training.checkpoints import Checkpoints
from activemlp_jax.training.config import default_config
from activemlp_jax.training.step import TrainState
from activemlp_jax.training.workdir import (
    EPOCHS_FILE,
    STEPS_FILE,
    append_record,
    claim_workdir,
    rewind_records,
)
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.torch_files import load_torch_checkpoint, write_checkpoint
from activemlp_jax.weights.torch_names import to_torch


class Kind(NamedTuple):
    """A kind of input: `make` writes a valid one, and `read` reads it as commands do."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]


CHECKPOINT = goldens.DATA / "micro_checkpoint.pth"


def make_legacy_checkpoint(path: Path) -> None:
    state_dict = torch.load(CHECKPOINT, weights_only=False)["model"]
    torch.save({"model": state_dict}, path, _use_new_zipfile_serialization=False)


def make_safetensors(path: Path) -> None:
    card = ModelCard(CLASSIFIER, PREPROCESSING, ("model",), "model", NAMES)
    state_dict = to_torch(goldens.rule_variables(CLASSIFIER))
    write_checkpoint(path, {"model": state_dict}, card.to_json())


def read_model(path: Path) -> None:
    card = read_card(path)
    read_weights(path, card, card.default_kind)


def make_description(path: Path) -> None:
    save_classifier(path)
    shutil.rmtree(path / "weights")


def state() -> Any:
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.arange(3.0)}
    return TrainState.create({"params": params}, optax.adam(0.1), ema_decay=0.9)


def make_run(path: Path) -> None:
    with claim_workdir(path, default_config()):
        for name, step in itertools.product((EPOCHS_FILE, STEPS_FILE), range(1, 9)):
            append_record(path / name, {"step": step, "epoch": step, "loss": 1.5 / step})
        with Checkpoints(path / "checkpoints", default_config()) as checkpoints:
            checkpoints.save(state().replace(step=state().step + 8), 8, [0.5] * 8, 50.0)


def read_run(path: Path) -> None:
    replicated = sharding.replicated(sharding.make_mesh())
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(state),
    )
    with (
        claim_workdir(path, default_config()),
        Checkpoints(path / "checkpoints", default_config()) as checkpoints,
    ):
        restored = checkpoints.restore(template)
        checkpoints.best()
        for name in (EPOCHS_FILE, STEPS_FILE):
            rewind_records(path / name, 0 if restored is None else int(restored.state.step))


def image(mode: str = "RGB", **options: Any) -> Kind:
    """Make the kind of images of a Pillow mode; the suffix of the file gives the format."""
    return Kind(lambda path: photo(0, 60, 45).convert(mode).save(path, **options), read_image)


def make_records(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_photos(Path(folder), ["ant", "bee"], count=3, size=(48, 40))
        prepare_folder(Path(folder), "photos", path, 1, Console(quiet=True))


def read_records(path: Path) -> None:
    os.environ["TFDS_DATA_DIR"] = str(path)
    constants.DATA_DIR = str(path)
    source = open_source("tfds:photos", "train")
    for index in range(len(source)):
        source[index]


KINDS = {
    "checkpoint.pth": Kind(partial(shutil.copy, CHECKPOINT), load_torch_checkpoint),
    "legacy.pth": Kind(make_legacy_checkpoint, load_torch_checkpoint),
    "weights.safetensors": Kind(make_safetensors, load_torch_checkpoint),
    "model": Kind(save_classifier, read_model),
    "segmentor": Kind(save_segmentor, read_model),
    "described": Kind(make_description, read_card),
    "run": Kind(make_run, read_run),
    "photo.jpg": image(quality=90),
    "gray.jpg": image(mode="L", progressive=True),
    "cmyk.jpg": image(mode="CMYK"),
    "photo.png": image(),
    "palette.png": image(mode="P"),
    "photo.webp": image(),
    "photo.gif": image(),
    "photo.bmp": image(),
    "photo.tiff": image(compression="tiff_lzw"),
    "photo.ppm": image(),
    "records": Kind(make_records, read_records),
}
