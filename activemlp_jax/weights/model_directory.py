"""The model directory: weights, and everything needed to use them.

    model.json     task, architecture, classes, preprocessing, origin of the weights
    weights/ema    the averaged variables in orbax format, if there are any
    weights/model  the variables of the last step in orbax format, if there are any
    SHA256SUMS     digests of all these files, checked when they are read

The variables are `params`, and for segmentation also `batch_stats`. Directories of earlier versions
have no digests.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from activemlp_jax.models.segmentor import Model
from activemlp_jax.utils.digests import DIGESTS, check_digests, read_digests, write_digests
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import previous_path, read_file
from activemlp_jax.utils.json_files import MOST_BYTES, parse_json
from activemlp_jax.utils.orbax_logs import without_tracebacks
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_card import CARD_ERRORS, ModelCard
from activemlp_jax.weights.torch_files import choose_kind
from activemlp_jax.weights.torch_names import variable_shapes

CARD = "model.json"


def write_model(directory: Path, card: ModelCard, weights: Mapping[str, Variables]) -> None:
    """Write a card and its weights into an empty directory; only one host of a run may call this.

    `weights` has the variables of `card.model` as numpy arrays, for every kind in `card.kinds`.
    Raises UserError if the files cannot be written, for example because the disk is full.
    """
    host = jax.process_index()
    this_host_only = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix="write_model"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=this_host_only)
    # One line for each key reads better than `indent`, which puts every number on its own line.
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in card.to_json().items()]
    try:
        with (
            without_tracebacks(),
            ocp.Checkpointer(handler, multiprocessing_options=this_host_only) as checkpointer,
        ):
            for kind in card.kinds:
                path = directory.absolute() / "weights" / kind
                checkpointer.save(path, args=ocp.args.StandardSave(weights[kind]))
        (directory / CARD).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        write_digests(directory)
    # tensorstore reports a full disk as any of these.
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)[:500]
        raise UserError(f"no model can be written in {directory.parent}: {reason}") from error


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """Read the `model.json` of a model directory: architecture, classes, preprocessing and origin.

    Args:
      directory: a model directory, as written by conversion or training.

    Raises:
      UserError: `model.json` is missing, invalid, or differs from its SHA-256 in `SHA256SUMS`.
    """
    root = Path(directory).expanduser()
    path = root / CARD
    if not path.is_file():
        raise UserError(f"{directory} is not a model directory: {_missing_card(root)}")
    text = read_file(path, MOST_BYTES)
    try:
        card = ModelCard.from_json(parse_json(text, "it"))
    except CARD_ERRORS as error:
        raise UserError(f"{path} is not a model description: {one_line(error)}") from error
    digests = read_digests(root)
    try:
        check_digests(root, {name: digests[name] for name in digests if name == CARD})
    except UserError as error:
        raise UserError(
            f"{error}; if you changed it on purpose, remove its line from {root / DIGESTS}"
        ) from error
    return card


def _missing_card(root: Path) -> str:
    """Explain why `root` has no `model.json`, and how to get one."""
    if not root.exists():
        if (previous := previous_path(root)).exists():
            return f"a kill cut short its replacement; what was there before is {previous}"
        return "there is no such folder"
    if root.is_file():
        return "it is a file; convert_torch_weights.py makes a model directory from PyTorch's files"
    if (root / "model" / "model.json").is_file():
        return f"it is the workdir of a run; the run's model is {root / 'model'}"
    return "it has no model.json; convert_torch_weights.py and train.py write such directories"


def read_weights(directory: str | os.PathLike[str], card: ModelCard, kind: str) -> Variables:
    """Read the variables of `kind`, one of `card.kinds`, as numpy arrays in the dtypes written.

    Raises UserError if they are missing, unreadable, changed since they were written, not finite,
    or not those of `card.model`.
    """
    root = Path(directory).expanduser().absolute()
    path = root / "weights" / kind
    # Users may delete the other kind to save space.
    other_kinds = {*card.kinds} - {kind}
    removed = tuple(f"weights/{k}/" for k in other_kinds if not (root / "weights" / k).exists())
    try:
        digests = read_digests(root)
        check_digests(root, {k: v for k, v in digests.items() if not k.startswith(removed)})
    except UserError as error:
        raise UserError(
            f"{path} cannot be read: {error}; take another copy of {directory}"
        ) from error
    try:
        with without_tracebacks(), ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(path)
    except MemoryError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types
        reason = one_line(str(error).split("\n")[0]) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error
    variables = jax.tree.map(np.asarray, variables)
    shapes = {key: value.shape for key, value in traverse_util.flatten_dict(variables).items()}
    expected = variable_shapes(card.model)
    wrong = [key for key in shapes | expected if shapes.get(key) != expected.get(key)]
    if wrong:
        name, shape = "/".join(wrong[0][1:]), shapes.get(wrong[0], "absent")
        raise UserError(
            f"{path} does not fit the directory's model.json: {len(wrong)} parameters differ; "
            f"{name} is {shape}, expected {expected.get(wrong[0], 'none')}"
        )
    if broken := describe_non_finite(variables):
        raise UserError(f"{path} cannot be used: {broken}")
    return variables


def load_pretrained(
    directory: str | os.PathLike[str], weights: str = "auto"
) -> tuple[Model, Variables]:
    """Load a model and its weights from a directory that conversion or training wrote.

    Args:
      directory: a model directory.
      weights: 'ema', 'model', or 'auto' for the directory's default: the averaged weights if it
        has them, unless conversion was told otherwise.

    Returns:
      The linen module, and its variables as arrays on the default device: `{'params': tree}`, and
      for segmentation `batch_stats`.

    Raises:
      UserError: the directory does not exist, is incomplete, or lacks these weights.
    """
    card = read_card(directory)
    kind = card.default_kind if weights == "auto" else choose_kind(card.kinds, weights, directory)
    variables = read_weights(directory, card, kind)
    return card.model, jax.tree.map(jnp.asarray, variables)


def describe_non_finite(tree: Any) -> str | None:
    """Describe the first array with non-finite values; return None if all values are finite.

    For an array that is sharded over hosts, each host checks only its own shards.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            parts = [leaf]
            if isinstance(leaf, jax.Array):
                parts = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
            bad = sum(np.size(part) - np.isfinite(np.asarray(part)).sum() for part in parts)
            if bad:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return f"{bad:,} of {leaf.size:,} values of {name} are not finite"
    return None
