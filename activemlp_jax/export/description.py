"""What lies beside exported files: `config.json` for programs, and a model card for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.export.usage import USAGE
from activemlp_jax.inference.imagenet_names import imagenet_names, readable_names
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.flops import count_cost
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.tasks.registry import TASKS
from activemlp_jax.utils.errors import one_line
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.convert import NAMES
from activemlp_jax.weights.model_directory import ModelCard

PAPER = "https://arxiv.org/abs/2203.06108"
CITATION = """\
@inproceedings{wei2023activetokenmixer,
  title     = {Active Token Mixer},
  author    = {Wei, Guoqiang and Zhang, Zhizheng and Lan, Cuiling and Lu, Yan and Chen, Zhibo},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2023},
  note      = {arXiv:2203.06108}
}"""
# What training measures, by its key in the source of weights: the metric's name to hubs, and ours.
MEASURED = {"test_accuracy": ("accuracy", "accuracy"), "test_mean_iou": ("mean_iou", "mIoU")}
SHOWN_CLASSES = 20


def describe(card: ModelCard, variables: Variables) -> dict[str, Any]:
    """What `config.json` says of the default weights of a model.

    Args:
      card: with the preprocessing of the exported function.
      variables: of the model.

    Returns:
      As JSON takes it; `files` is empty.
    """
    content = card.to_json()
    shown = card.preprocessing
    side = shown.image_size if isinstance(shown, Preprocessing) else shown.window
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    logits = jax.eval_shape(card.model.apply, variables, images)
    cost = count_cost(card.model, side, side)
    number = card.model.num_classes
    if isinstance(card.model, ActiveMLP) and (card.class_names or number == len(imagenet_names())):
        content["classes"]["names"] = readable_names(card.class_names, number)
    kept = ("task", "name", "architecture", "classes", "preprocessing", "source")
    return {
        **{key: content[key] for key in kept},
        "weights": card.default_kind,
        "parameters": cost.parameters,
        "multiply_adds": cost.macs,
        "input": {"name": "images", "shape": ["batch", *images.shape[1:]], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", *logits.shape[1:]], "dtype": "float32"},
        "files": {},
    }


def _code(value: object) -> str:
    """Any value as code, fit for a line or a table of Markdown."""
    text = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _measured(card: ModelCard) -> tuple[str, str, float] | None:
    """A metric's name to hubs, ours, and its value in percent, where the source says one."""
    for key, (metric, name) in MEASURED.items():
        value = card.source.get(key)
        if isinstance(value, int | float):
            return metric, name, float(value)
    return None


def _title(card: ModelCard) -> str:
    name = card.name or "ActiveMLP"
    return f"{name} with {card.model.head}" if isinstance(card.model, ActiveSegmentor) else name


def _front_matter(card: ModelCard, files: Sequence[str]) -> str:
    """The YAML that model hubs read."""
    task = TASKS[card.task].hub_name
    tags = ["activemlp", "active-token-mixer", "jax", "flax"]
    tags += [Path(file).suffix[1:] for file in files]
    lines = ["library_name: activemlp_jax", f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    measured = _measured(card)
    if measured:
        metric, name, value = measured
        # A string of JSON is one of YAML.
        data = json.dumps(one_line(card.source.get("trained_on", "unknown")), ensure_ascii=False)
        lines += ["metrics:", f"- {metric}", "model-index:", f"- name: {_title(card)}"]
        lines += ["  results:", "  - task:", f"      type: {task}"]
        lines += ["    dataset:", f"      name: {data}", f"      type: {data}"]
        if "test_split" in card.source:
            split = json.dumps(one_line(card.source["test_split"]), ensure_ascii=False)
            lines.append(f"      split: {split}")
        lines += ["    metrics:", f"    - type: {metric}", f"      name: {name}"]
        lines += [f"      value: {value:.2f}"]
    return "\n".join(["---", *lines, "---"])


def _classes(card: ModelCard, found: dict[str, Any]) -> str:
    number = f"{card.model.num_classes:,}"
    if not found["classes"]["names"]:
        return f"{number}, without names"
    if card.model.num_classes > SHOWN_CLASSES:
        return f"{number}, named in `config.json`"
    return f"{number}: {', '.join(map(_code, found['classes']['names']))}"


def _numbers(card: ModelCard, found: dict[str, Any]) -> str:
    """The architecture and its costs, as a table."""
    fields = dict(found["architecture"])
    fields |= fields.pop("backbone", {})
    rows = [(name, _code(value)) for name, value in fields.items()]
    side = found["input"]["shape"][1]
    rows += [
        ("parameters", f"{found['parameters']:,}"),
        ("multiply-adds", f"{found['multiply_adds'] / 1e9:.3g} G for {side} by {side} pixels"),
        ("weights", NAMES[card.default_kind]),
        ("classes", _classes(card, found)),
    ]
    for way in ("input", "output"):
        name, shape, dtype = found[way]["name"], found[way]["shape"], found[way]["dtype"]
        rows.append((way, f"`{name}`, `[{', '.join(map(str, shape))}]`, {dtype}"))
    return _table(rows)


def _input(card: ModelCard) -> str:
    """How an image becomes an input, in words."""
    shown = card.preprocessing
    if isinstance(shown, Preprocessing):
        short = int(shown.resize_factor * shown.image_size)
        made = (
            f"The short side of an image is resized to {short} pixels (bicubic), and of that the "
            f"centre, {shown.image_size} by {shown.image_size}, is cut out."
        )
    else:
        made = f"Windows of {shown.window} by {shown.window} pixels are cut out of an image"
        if shown.long_side:
            limits = f"{shown.long_side} by {shown.short_side}"
            made += f", which is first resized to fit into {limits} (bilinear)"
        made += ". There is a label for each fourth pixel along the height and the width."
    return (
        f"{made} Pixels are red, green and blue, divided by 255. Then {shown.mean} is taken away, "
        f"and what is left is divided by {shown.std}."
    )


def _count(number: object) -> str:
    """A number for people; whatever else the source says, as code."""
    return f"{number:,}" if isinstance(number, int) else _code(number)


def _length(source: Mapping[str, Any]) -> str:
    """How much of the run the weights have behind them; '' where the source does not say it."""
    for unit in ("step", "epoch"):
        if f"{unit}s" in source:
            done, all_of_it = source.get(unit), source[f"{unit}s"]
            words = f"{_count(all_of_it)} {unit}{'s' * (all_of_it != 1)}"
            return words if done == all_of_it else f"{_count(done)} of {words}"
    return ""


def _recipe(source: Mapping[str, Any]) -> str:
    """How training made the weights, in words; '' where the source does not say it."""
    length = _length(source)
    if not length or "trained_on" not in source:
        return ""
    number = f"{_count(source['train_images'])} images of " if "train_images" in source else ""
    config = f" by the config {_code(source['config'])}" if "config" in source else ""
    start = f"the weights in {_code(source['init_from'])}" if "init_from" in source else ""
    return (
        f"Trained{config} on {number}{_code(source['trained_on'])} for {length}, from "
        f"{start or 'random weights'}."
    )


def _origin(card: ModelCard) -> str:
    if not card.source:
        return "Not said."
    table = _table([(_code(key), _code(value)) for key, value in card.source.items()])
    return "\n\n".join(filter(None, (_recipe(card.source), table)))


def _quality(card: ModelCard) -> str:
    measured = _measured(card)
    if not measured:
        return "Not measured."
    _, name, value = measured
    source = card.source
    data = _code(source.get("trained_on", "unknown"))
    number = f"{_count(source['test_images'])} " if "test_images" in source else ""
    length = _length(source)
    when = f"after {length}" if length else "as training ended"
    return f"{name} {value:.2f}% on the {number}test images of {data}, measured {when}."


def _licence(card: ModelCard) -> str:
    """What is known of it; that of the weights is not for this package to say."""
    source = card.source
    fits = [f"the data, {_code(source['trained_on'])}"] if "trained_on" in source else []
    if "init_from" in source:
        fits.append(f"the weights that training started from, {_code(source['init_from'])}")
    elif "file" in source:
        fits.append(f"the file that they were converted from, {_code(source['file'])}")
    condition = f" It depends on {' and '.join(fits)}." if fits else ""
    return (
        "The code that wrote these files is Apache-2.0. The licence of the weights is for those to "
        f"say who made them.{condition} Before you publish this folder, say it here and, as "
        "`license:`, at the top."
    )


def write_readme(path: Path, card: ModelCard, found: dict[str, Any]) -> None:
    """Write the model card.

    Args:
      path: of the file.
      card: with the preprocessing of the exported function.
      found: the content of `config.json`.
    """
    parts = [
        _front_matter(card, list(found["files"])),
        f"# {_title(card)}",
        f"A model that {TASKS[card.task].does}: ActiveMLP, the backbone of the "
        f"[Active Token Mixer]({PAPER}).",
        _numbers(card, found),
        "## Input",
        _input(card),
        "## Where the weights come from",
        _origin(card),
        "## Quality",
        _quality(card),
        "## Use",
        *(USAGE[Path(file).suffix[1:]](found) for file in found["files"]),
        "## Licence",
        _licence(card),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
