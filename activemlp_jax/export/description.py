"""Description of an export: `config.json` for programs, and a model card for people."""

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
from activemlp_jax.weights.model_card import ModelCard

PAPER = "https://arxiv.org/abs/2203.06108"
CITATION = """\
@inproceedings{wei2023activetokenmixer,
  title     = {Active Token Mixer},
  author    = {Wei, Guoqiang and Zhang, Zhizheng and Lan, Cuiling and Lu, Yan and Chen, Zhibo},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2023},
  note      = {arXiv:2203.06108}
}"""
# Metrics by their key in `ModelCard.source`: the metric's name on model hubs, and ours.
MEASURED = {"test_accuracy": ("accuracy", "accuracy"), "test_mean_iou": ("mean_iou", "mIoU")}
MAX_LISTED_CLASSES = 20


def describe(card: ModelCard, variables: Variables) -> dict[str, Any]:
    """Describe the default weights of a model for `config.json`.

    Args:
      card: card with the preprocessing of the exported function.
      variables: variables of the model.

    Returns:
      The content of `config.json`, without entries in `files`.
    """
    content = card.to_json()
    preprocessing = card.preprocessing
    if isinstance(preprocessing, Preprocessing):
        side = preprocessing.image_size
    else:
        side = preprocessing.window
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    logits = jax.eval_shape(card.model.apply, variables, images)
    cost = count_cost(card.model, side, side)
    count = card.model.num_classes
    if isinstance(card.model, ActiveMLP) and (card.class_names or count == len(imagenet_names())):
        content["classes"]["names"] = readable_names(card.class_names, count)
    copied_keys = ("task", "name", "architecture", "classes", "preprocessing", "source")
    return {
        **{key: content[key] for key in copied_keys},
        "weights": card.default_kind,
        "parameters": cost.parameters,
        "multiply_adds": cost.macs,
        "input": {"name": "images", "shape": ["batch", *images.shape[1:]], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", *logits.shape[1:]], "dtype": "float32"},
        "files": {},
    }


def _code(value: object) -> str:
    """Format a value as Markdown code that fits on one line and in a table."""
    text = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _measured(card: ModelCard) -> tuple[str, str, float] | None:
    """Find a metric in the source: its name on hubs, our name, and its value in percent."""
    for key, (metric, name) in MEASURED.items():
        value = card.source.get(key)
        if isinstance(value, int | float):
            return metric, name, float(value)
    return None


def _title(card: ModelCard) -> str:
    name = card.name or "ActiveMLP"
    return f"{name} with {card.model.head}" if isinstance(card.model, ActiveSegmentor) else name


def _front_matter(card: ModelCard, files: Sequence[str]) -> str:
    """Write the YAML header that model hubs read."""
    task = TASKS[card.task].hub_name
    tags = ["activemlp", "active-token-mixer", "jax", "flax"]
    tags += [Path(file).suffix[1:] for file in files]
    lines = ["library_name: activemlp_jax", f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    measured = _measured(card)
    if measured:
        metric, name, value = measured
        # A JSON string is also a YAML string.
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


def _classes(card: ModelCard, config: dict[str, Any]) -> str:
    number = f"{card.model.num_classes:,}"
    if not config["classes"]["names"]:
        return f"{number}, without names"
    if card.model.num_classes > MAX_LISTED_CLASSES:
        return f"{number}, named in `config.json`"
    return f"{number}: {', '.join(map(_code, config['classes']['names']))}"


def _numbers(card: ModelCard, config: dict[str, Any]) -> str:
    """Write a table of the architecture and its costs."""
    fields = dict(config["architecture"])
    fields |= fields.pop("backbone", {})
    rows = [(name, _code(value)) for name, value in fields.items()]
    side = config["input"]["shape"][1]
    rows += [
        ("parameters", f"{config['parameters']:,}"),
        ("multiply-adds", f"{config['multiply_adds'] / 1e9:.3g} G for {side} by {side} pixels"),
        ("weights", NAMES[card.default_kind]),
        ("classes", _classes(card, config)),
    ]
    for key in ("input", "output"):
        name, shape, dtype = config[key]["name"], config[key]["shape"], config[key]["dtype"]
        rows.append((key, f"`{name}`, `[{', '.join(map(str, shape))}]`, {dtype}"))
    return _table(rows)


def _input(card: ModelCard) -> str:
    """Describe how an image becomes the input."""
    prep = card.preprocessing
    if isinstance(prep, Preprocessing):
        short = int(prep.resize_factor * prep.image_size)
        text = (
            f"The short side of an image is resized to {short} pixels (bicubic), and of that the "
            f"center, {prep.image_size} by {prep.image_size}, is cut out."
        )
    else:
        text = f"Windows of {prep.window} by {prep.window} pixels are cut out of an image"
        if prep.long_side:
            limits = f"{prep.long_side} by {prep.short_side}"
            text += f", which is first resized to fit into {limits} (bilinear)"
        text += ". There is a label for each fourth pixel along the height and the width."
    return (
        f"{text} Pixels are red, green and blue, divided by 255. Then {prep.mean} is taken away, "
        f"and what is left is divided by {prep.std}."
    )


def _count(number: object) -> str:
    """Format an integer with commas, and any other value as code."""
    return f"{number:,}" if isinstance(number, int) else _code(number)


def _length(source: Mapping[str, Any]) -> str:
    """Describe how far training had come, such as '28 of 40 epochs'; '' if unknown."""
    for unit in ("step", "epoch"):
        if f"{unit}s" in source:
            done, total = source.get(unit), source[f"{unit}s"]
            text = f"{_count(total)} {unit}{'s' * (total != 1)}"
            return text if done == total else f"{_count(done)} of {text}"
    return ""


def _recipe(source: Mapping[str, Any]) -> str:
    """Describe in a sentence how the weights were trained; '' if unknown."""
    length = _length(source)
    if not length or "trained_on" not in source:
        return ""
    count = f"{_count(source['train_images'])} images of " if "train_images" in source else ""
    by_config = f" by the config {_code(source['config'])}" if "config" in source else ""
    start = f"the weights in {_code(source['init_from'])}" if "init_from" in source else ""
    return (
        f"Trained{by_config} on {count}{_code(source['trained_on'])} for {length}, from "
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
    count = f"{_count(source['test_images'])} " if "test_images" in source else ""
    length = _length(source)
    when = f"after {length}" if length else "as training ended"
    return f"{name} {value:.2f}% on the {count}test images of {data}, measured {when}."


def _license(card: ModelCard) -> str:
    """Say what the license of the weights depends on; choosing it is not up to this package."""
    source = card.source
    depends_on = [f"the data, {_code(source['trained_on'])}"] if "trained_on" in source else []
    if "init_from" in source:
        depends_on.append(f"the weights that training started from, {_code(source['init_from'])}")
    elif "file" in source:
        depends_on.append(f"the file that they were converted from, {_code(source['file'])}")
    condition = f" It depends on {' and '.join(depends_on)}." if depends_on else ""
    return (
        "The code that wrote these files is Apache-2.0. The license of the weights is for those to "
        f"say who made them.{condition} Before you publish this folder, say it here and, as "
        "`license:`, at the top."
    )


def write_readme(path: Path, card: ModelCard, config: dict[str, Any]) -> None:
    """Write the model card.

    Args:
      path: file to write.
      card: card with the preprocessing of the exported function.
      config: the content of `config.json`.
    """
    parts = [
        _front_matter(card, list(config["files"])),
        f"# {_title(card)}",
        f"A model that {TASKS[card.task].does}: ActiveMLP, the backbone of the "
        f"[Active Token Mixer]({PAPER}).",
        _numbers(card, config),
        "## Input",
        _input(card),
        "## Where the weights come from",
        _origin(card),
        "## Quality",
        _quality(card),
        "## Use",
        *(USAGE[Path(file).suffix[1:]](config) for file in config["files"]),
        "## License",
        _license(card),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
