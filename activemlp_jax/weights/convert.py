"""Convert PyTorch weights of ActiveMLP to a model directory, or a model directory to PyTorch.

Examples:
  python convert_torch_weights.py activemlp_tiny.pth models/active_tiny --verify
  python convert_torch_weights.py upernet_large.pth models/upernet_large --verify
  python convert_torch_weights.py models/active_tiny back.pth --to-torch
"""

import argparse
import dataclasses
import os
from pathlib import Path

from activemlp_jax.command_line import Parser
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.active_mlp import VARIANTS, list_models
from activemlp_jax.models.segmentor import Model, backbone, variant_name
from activemlp_jax.utils.digests import sha256
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command, one_line
from activemlp_jax.utils.files import check_output, write_directory_aside
from activemlp_jax.utils.json_files import expect
from activemlp_jax.utils.runtime import collect_garbage_rarely
from activemlp_jax.weights.model_card import CARD_ERRORS, ModelCard
from activemlp_jax.weights.model_directory import read_card, read_weights, write_model
from activemlp_jax.weights.model_types import (
    MAX_ROWS,
    architecture,
    describe_architecture,
    model_type,
)
from activemlp_jax.weights.torch_files import (
    KINDS,
    TorchCheckpoint,
    choose_kind,
    read_checkpoint,
    write_checkpoint,
)
from activemlp_jax.weights.torch_names import BATCH_COUNT, from_torch, infer_model, to_torch

NAMES = {"ema": "averaged (EMA)", "model": "raw"}
TORCH_SUFFIXES = (".pth", ".pt", ".safetensors")  # formats that --to-torch writes
STATISTICS = ("running_mean", "running_var", BATCH_COUNT)  # of batch norm; not parameters


def main() -> None:
    """Run the command line of `convert_torch_weights.py`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="a .pth or .safetensors file")
    parser.add_argument("target", metavar="OUT", help="the model directory to make")
    parser.add_argument(
        "--weights",
        choices=list(KINDS),
        help="the weights that later tools use by default (ema if the file has them); with "
        "--to-torch, write only these",
    )
    parser.add_argument(
        "--model",
        choices=list_models(),
        help="reject weights of any other variant; for a segmentation model, of another backbone "
        "(by default, the variant is inferred from the shapes)",
    )
    parser.add_argument("--num-classes", type=int, help="reject any other number of classes")
    parser.add_argument(
        "--image-size",
        type=int,
        help="image side that a classifier's weights are for (default: the file's, or else 224)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the result and a PyTorch model with the file's weights on random images, in "
        "float64, and print the difference; write nothing if it is over 1e-9",
    )
    parser.add_argument(
        "--to-torch",
        action="store_true",
        help="convert back: IN is a model directory, OUT a file. For a classifier, a .pth file has "
        "the original's form, {'model': ..., 'model_ema': ...}; with --weights, only the chosen "
        "weights, under 'model'. For a segmentation model, it has one set of weights in "
        "mmsegmentation's form, {'meta': ..., 'state_dict': ...}. A .safetensors file has one set "
        "of weights",
    )
    arguments = parser.parse_args()
    collect_garbage_rarely()
    source, target = Path(arguments.source), Path(arguments.target)
    with errors_in_one_line(target):
        if os.path.lexists(target):
            raise UserError(f"{target} is already there; give another place")
        check_output(target)
        if arguments.to_torch:
            for option in ("model", "num_classes", "image_size", "verify"):
                if getattr(arguments, option) not in (None, False):
                    raise UserError(f"--{option.replace('_', '-')} does not go with --to-torch")
            if target.suffix not in TORCH_SUFFIXES:
                suffixes = " or ".join(TORCH_SUFFIXES)
                raise UserError(f"OUT is {target}, expected a name that ends in {suffixes}")
            _to_torch(source, target, arguments.weights)
        elif (source / "model.json").is_file():
            raise UserError(
                f"{source} is a model directory, expected a file; --to-torch converts it back"
            )
        else:
            _from_torch(source, target, arguments)


def _check_expected(arguments: argparse.Namespace, inferred: Model) -> Model:
    """Return the `inferred` model with the number of classes that the command line asks for."""
    if arguments.model not in (None, variant_name(inferred)):
        fields = VARIANTS[arguments.model]
        expected = inferred.clone(**({"backbone": fields} if model_type(inferred).head else fields))
        raise ValueError(
            f"the weights are of {describe_architecture(inferred)}, expected "
            f"{describe_architecture(expected)}"
        )
    if arguments.num_classes is None:
        return inferred
    classes = expect(arguments.num_classes, "num_classes", int, 1, MAX_ROWS)
    return inferred.clone(num_classes=classes)


def _preprocessing(
    model: Model, embedded: ModelCard | None, recorded: int | None, wanted: int | None
) -> Preprocessing | ScenePreprocessing:
    """Choose the file's own preprocessing or the default, with the image size of --image-size."""
    if embedded and type(embedded.model) is not type(model):
        raise ValueError("the description of its model is for another task than its weights")
    takes_any_size = model_type(model).uses_mmsegmentation
    if takes_any_size and wanted is not None:
        raise ValueError(
            "--image-size does not go with a segmentation model, which takes scenes of any size: "
            "leave it out"
        )
    preprocessing = embedded.preprocessing if embedded else model_type(model).preprocessing()
    size = recorded if wanted is None else wanted
    return preprocessing if takes_any_size or size is None else preprocessing.with_side(size)


def _from_torch(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(source)
    embedded = None  # the model card that `--to-torch` stored in the file
    if checkpoint.description is not None:
        try:
            embedded = ModelCard.from_json(checkpoint.description)
        except CARD_ERRORS as error:
            raise UserError(f"{source} has a broken description of its model: {error}") from error
    default = choose_kind(checkpoint.weights, arguments.weights or "auto", source)
    try:
        model = _check_expected(arguments, infer_model(checkpoint.weights[default]))
        sizes = checkpoint.image_size, arguments.image_size
        preprocessing = _preprocessing(model, embedded, *sizes)
        variables = {
            kind: from_torch(state_dict, model) for kind, state_dict in checkpoint.weights.items()
        }
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    digest = sha256(source)
    names = (embedded.class_names if embedded else None) or checkpoint.class_names
    class_names = names if names and len(names) == model.num_classes else None
    if embedded and embedded.source:  # keep where the weights come from
        origin = {**embedded.source, "copied_from": source.name, "copied_from_sha256": digest}
    else:
        origin = {"file": source.name, "sha256": digest, "epoch": checkpoint.epoch}
        if checkpoint.iteration is not None:
            origin["iteration"] = checkpoint.iteration
    card = ModelCard(model, preprocessing, tuple(variables), default, class_names, origin)
    print(one_line(f"{source}: SHA-256 {digest}"))
    _print_summary(card, checkpoint)
    with write_directory_aside(target) as directory:
        write_model(directory, card, variables)
        if arguments.verify:
            _verify(directory, checkpoint)
    print(one_line(f"wrote {target}; the {NAMES[default]} weights are its default"))


def _print_summary(card: ModelCard, checkpoint: TorchCheckpoint) -> None:
    state_dict = checkpoint.weights[card.default_kind]
    arrays = [array for key, array in state_dict.items() if not key.endswith(STATISTICS)]
    parameters = sum(array.size for array in arrays)
    types = ", ".join(sorted({str(array.dtype) for array in arrays}))
    name = card.name or f"of no published variant, depths {backbone(card.model).depths}"
    classes = card.describe_classes()
    if head := architecture(card.model).get("head"):
        name += f", under the head {head!r}"
    if checkpoint.class_names and not card.class_names:
        classes += f"; the file names {len(checkpoint.class_names)}, which are left out"
    unit = "epoch" if card.source.get("iteration") is None else "iteration"
    count = card.source.get(unit)
    progress = f"{unit} {'unknown' if count is None else count}"
    kinds = " and ".join(NAMES[kind] for kind in card.kinds)
    # Names and the epoch come from the file, which may hold control characters.
    print("  model:  ", one_line(f"{name}, {parameters:,} parameters, {classes}"))
    print("  weights:", one_line(f"{kinds}, {types}; {progress}"))
    print("  images: ", card.preprocessing.describe().removeprefix("images ").removeprefix("of "))


def _verify(directory: Path, checkpoint: TorchCheckpoint) -> None:
    try:
        from activemlp_jax.weights.verify import MAX_DIFFERENCE, largest_difference
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch: {install_command('torch')}") from error
    for kind, difference in largest_difference(directory, checkpoint.weights).items():
        line = f"{NAMES[kind]} weights: PyTorch and flax differ by {difference:.1e} of the logits"
        if not difference <= MAX_DIFFERENCE:
            raise UserError(f"{line}, more than {MAX_DIFFERENCE:.0e}; nothing was written")
        print(f"verified {line} (random images, float64)")


def _to_torch(source: Path, target: Path, chosen: str | None) -> None:
    card = read_card(source)
    default = choose_kind(card.kinds, chosen, source) if chosen else card.default_kind
    is_mmsegmentation = model_type(card.model).uses_mmsegmentation
    if chosen or is_mmsegmentation or target.suffix == ".safetensors":
        keys = {default: "model"}
    else:
        keys = {kind: kind for kind in card.kinds}
    card = dataclasses.replace(card, kinds=tuple(keys), default_kind=default)
    weights = {key: to_torch(read_weights(source, card, kind)) for kind, key in keys.items()}
    write_checkpoint(target, weights, card.to_json(), card.class_names)
    kinds_written = " and ".join(NAMES[kind] for kind in keys)
    print(one_line(f"wrote the {kinds_written} weights to {target}"))
