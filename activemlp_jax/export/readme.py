"""The README of an export: a model card for people and model hubs, with code that runs as it is."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from activemlp_jax.tasks.base import Task
from activemlp_jax.tasks.registry import TASKS
from activemlp_jax.utils.errors import one_line
from activemlp_jax.weights.convert import NAMES
from activemlp_jax.weights.model_card import ModelCard

CARD = """\
---
library_name: activemlp_jax
pipeline_tag: {task.hub_name}
tags:
- activemlp
- active-token-mixer
- jax
- flax
{tags}{results}
---

# {title}

A model that {task.does}: ActiveMLP, the backbone of the \
[Active Token Mixer](https://arxiv.org/abs/2203.06108).

| | |
|---|---|
{architecture}
| parameters | {config[parameters]:,} |
| multiply-adds | {giga:.3g} G for {side} by {side} pixels |
| weights | {weights} |
| classes | {card.model.num_classes:,}{classes} |
| input | `images`, `[batch, {side}, {side}, 3]`, float32 |
| output | `logits`, `[{output}]`, float32 |

## Input

{usage.preparation} Pixels are red, green and blue, divided by 255. Then {prep.mean} is taken \
away, and what is left is divided by {prep.std}.

## Where the weights come from

{origin}

## Quality

{quality}

## Use

{use}

## License

The code that wrote these files is Apache-2.0. The license of the weights is for those to say who \
made them.{condition} Before you publish this folder, say it here and, as `license:`, at the top.

## Citation

```bibtex
@inproceedings{{wei2023activetokenmixer,
  title     = {{Active Token Mixer}},
  author    = {{Wei, Guoqiang and Zhang, Zhizheng and Lan, Cuiling and Lu, Yan and Chen, Zhibo}},
  booktitle = {{Proceedings of the AAAI Conference on Artificial Intelligence}},
  year      = {{2023}},
  note      = {{arXiv:2203.06108}}
}}
```
"""

# Part of the YAML header, which model hubs read; only if training measured the task's score.
RESULTS = """
metrics:
- {task.score}
model-index:
- name: {title}
  results:
  - task:
      type: {task.hub_name}
    dataset:
      name: {data}
      type: {data}{split}
    metrics:
    - type: {task.score}
      name: {task.score_name}
      value: {score:.2f}"""

SAFETENSORS = """\
### `model.safetensors`

The weights alone, by the names and in the layouts of the authors' PyTorch release. With the package
`activemlp_jax`:

```python
import activemlp_jax as am

variables = am.load_torch_checkpoint("model.safetensors")  # flax variables, bit for bit
```

`python convert_torch_weights.py model.safetensors MODEL_DIR` makes a model directory of it, for
`am.load_pretrained(MODEL_DIR)` and every command of the package."""

# The function of a StableHLO or ONNX file, and a program that prints the classes of a photo.
PROGRAM = """\
### `{file}`

The function with its weights inside, {about}

It takes `[batch, {side}, {side}, 3]` float32, a batch of any size. Another dtype, image size or \
order of axes is refused, with an error that says what was expected.

```python
import json
from pathlib import Path

{imports}
from PIL import Image

config = json.loads(Path("config.json").read_text())
prep, names = config["preprocessing"], config["classes"]["names"]
{load}

photo = Image.open("photo.jpg").convert("RGB")
{usage.crop}
box = left, top, left + side, top + side
pixels = np.asarray(photo.crop(box), np.float32)[None]  # [batch, height, width, RGB]
images = (pixels / 255 - np.float32(prep["mean"])) / np.float32(prep["std"])
{run}  # [{output}]
{answer}
```"""
# For each file, what to know and install, and the program's lines that import, load and run.
PROGRAMS = {
    "model.stablehlo": (
        """\
for {platforms}. It needs
`pip install jax flatbuffers`, and to open photos `pillow`. It was written by jax
{jax}, and JAX says [for how long others read it]\
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).""",
        "import jax\nimport jax.export\nimport numpy as np",
        'exported = jax.export.deserialize(Path("model.stablehlo").read_bytes())\n'
        "program = jax.jit(exported.call)",
        "logits = program(images)",
    ),
    "model.onnx": (
        "in opset {opset}. It needs\n`pip install onnxruntime`, and to open photos `pillow`.",
        "import numpy as np\nimport onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})',
    ),
}
MAX_LISTED_CLASSES = 20


def write_readme(path: Path, card: ModelCard, config: Mapping[str, Any]) -> None:
    """Write the model card of an export; `config` is the content of its `config.json`."""
    names, prep, task = config["classes"]["names"], card.preprocessing, TASKS[card.task]
    if not names:
        classes = ", without names"
    elif len(names) > MAX_LISTED_CLASSES:
        classes = ", named in `config.json`"
    else:
        classes = f": {', '.join(map(_code, names))}"
    architecture = dict(config["architecture"])
    architecture |= architecture.pop("backbone", {})
    head, usage = architecture.get("head"), task.usage(prep)
    fields = {
        "card": card,
        "config": config,
        "task": task,
        "prep": prep,
        "usage": usage,
        "answer": usage.answer.replace("label_name", "names[label]" if names else "label"),
        "title": (card.name or "ActiveMLP") + (f" with {head}" if head else ""),
        "classes": classes,
        "architecture": _rows(architecture),
        "giga": config["multiply_adds"] / 1e9,
        "weights": NAMES[card.default_kind],
        "side": config["input"]["shape"][1],
        "output": ", ".join(map(str, config["output"]["shape"])),
        "tags": "\n".join(f"- {Path(file).suffix[1:]}" for file in config["files"]),
    }
    fields |= _training_and_quality(card.source, task, fields["title"])
    fields["use"] = "\n\n".join(
        _use(file, facts, fields) for file, facts in config["files"].items()
    )
    path.write_text(CARD.format(**fields), encoding="utf-8")


def _use(file: str, facts: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Describe how to use one of the files."""
    if file == "model.safetensors":
        return SAFETENSORS
    about, imports, load, run = PROGRAMS[file]
    about = about.format(**{**facts, "platforms": ", ".join(facts.get("platforms", ()))})
    return PROGRAM.format(**fields, file=file, about=about, imports=imports, load=load, run=run)


def _training_and_quality(
    source: Mapping[str, Any], task: type[Task], title: str
) -> dict[str, str]:
    """Describe the weights' training, their measured quality, and what their license depends on."""

    def known(key: str, text: str = "{}") -> str:
        """Return `text` with `{}` replaced by the value of `key`, or '' if the key is missing."""
        return text.format(_count(source[key])) if key in source else ""

    length, data = _length(source), known("trained_on")
    origin = f"| | |\n|---|---|\n{_rows(source, _code)}" if source else "Not said."
    if length and data:
        by, images = known("config", " by the config {}"), known("train_images", "{} images of ")
        start = known("init_from", "the weights in {}") or "random weights"
        origin = f"Trained{by} on {images}{data} for {length}, from {start}.\n\n{origin}"

    score, results, quality = source.get(f"test_{task.score}"), "", "Not measured."
    if isinstance(score, int | float):
        # A JSON string is also a YAML string.
        name, split = (
            json.dumps(one_line(source.get(key, "unknown")), ensure_ascii=False)
            for key in ("trained_on", "test_split")
        )
        split = f"\n      split: {split}" if "test_split" in source else ""
        results = RESULTS.format(task=task, title=title, data=name, split=split, score=score)
        when = f"after {length}" if length else "as training ended"
        images = f"{known('test_images', '{} ')}test images of {data or '`unknown`'}"
        quality = f"{task.score_name} {score:.2f}% on the {images}, measured {when}."

    origins = [
        known("trained_on", "the data, {}"),
        known("init_from", "the weights that training started from, {}")
        or known("file", "the file that they were converted from, {}"),
    ]
    condition = " and ".join(filter(None, origins))
    return {
        "origin": origin,
        "results": results,
        "quality": quality,
        "condition": f" It depends on {condition}." if condition else "",
    }


def _length(source: Mapping[str, Any]) -> str:
    """Describe how far training had come, such as '28 of 40 epochs'; '' if unknown."""
    for unit in ("step", "epoch"):
        if f"{unit}s" in source:
            done, total = source.get(unit), source[f"{unit}s"]
            text = f"{_count(total)} {unit}{'s' * (total != 1)}"
            return text if done == total else f"{_count(done)} of {text}"
    return ""


def _rows(content: Mapping[str, Any], format_key: Callable[[str], str] = str) -> str:
    """Write the rows of a Markdown table."""
    return "\n".join(f"| {format_key(key)} | {_code(content[key])} |" for key in content)


def _count(value: object) -> str:
    """Format an integer with commas, and any other value as code."""
    return f"{value:,}" if isinstance(value, int) else _code(value)


def _code(value: object) -> str:
    """Format a value as Markdown code that fits on one line and in a table."""
    text = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{text}`"
