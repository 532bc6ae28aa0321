"""Usage section of a model card for each format, with code that runs as it is."""

from collections.abc import Callable
from typing import Any

GUARANTEES = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
# Program that prints the names of the classes in a photo.
PROGRAM = """\
```python
import json
from pathlib import Path

{imports}
from PIL import Image

config = json.loads(Path("config.json").read_text())
prep, names = config["preprocessing"], config["classes"]["names"]
{load}

photo = Image.open("photo.jpg").convert("RGB")
side = {side}
{fit}
box = left, top, left + side, top + side
pixels = np.asarray(photo.crop(box), np.float32)[None]  # [batch, height, width, RGB]
images = (pixels / 255 - np.float32(prep["mean"])) / np.float32(prep["std"])
{run}  # [{shape}]
{answer}
```"""
# Code that resizes and crops the photo, by task.
CENTER_CROP = """\
short = int(prep["resize_factor"] * side)
width, height = (int(short * length / min(photo.size)) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BICUBIC)
left, top = round((width - side) / 2), round((height - side) / 2)"""
FIT_LIMITS = """\
factor = min(prep["long_side"] / max(photo.size), prep["short_side"] / min(photo.size))
width, height = (round(factor * length) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BILINEAR)
"""
CENTER_WINDOW = "left, top = ((length - side) // 2 for length in photo.size)  # one window of many"
TOP_CLASSES = """\
scores = np.exp(logits[0] - np.max(logits[0]))
for label in np.argsort(-scores)[:5]:
    print({name}, f"{{scores[label] / scores.sum():.1%}}")"""
CLASS_SHARES = """\
labels, counts = np.unique(np.argmax(logits[0], axis=-1), return_counts=True)
for label, count in zip(labels, counts):
    print({name}, f"{{count / counts.sum():.1%}}")"""


def _program(config: dict[str, Any], imports: str, load: str, run: str) -> str:
    if config["task"] == "segmentation":
        resize = FIT_LIMITS if config["preprocessing"]["long_side"] else ""
        fit, answer = resize + CENTER_WINDOW, CLASS_SHARES
    else:
        fit, answer = CENTER_CROP, TOP_CLASSES
    return PROGRAM.format(
        imports=imports,
        load=load,
        run=run,
        side='prep["window"]' if config["task"] == "segmentation" else 'prep["image_size"]',
        fit=fit,
        shape=", ".join(map(str, config["output"]["shape"])),
        answer=answer.format(name="names[label]" if config["classes"]["names"] else "label"),
    )


def _accepted(config: dict[str, Any]) -> str:
    """Describe what the function takes and what it refuses."""
    shape = ", ".join(map(str, config["input"]["shape"]))
    return (
        f"It takes `[{shape}]` {config['input']['dtype']}, a batch of any size. Another dtype, "
        "image size or order of axes is refused, with an error that says what was expected."
    )


def _stablehlo(config: dict[str, Any]) -> str:
    facts = config["files"]["model.stablehlo"]
    platforms = ", ".join(facts["platforms"])
    program = _program(
        config,
        "import jax\nimport jax.export\nimport numpy as np",
        'exported = jax.export.deserialize(Path("model.stablehlo").read_bytes())\n'
        "program = jax.jit(exported.call)",
        "logits = program(images)",
    )
    return f"""\
### `model.stablehlo`

The function with its weights inside, for {platforms}. It needs
`pip install jax flatbuffers`, and to open photos `pillow`. It was written by jax
{facts["jax"]}, and JAX says [for how long others read it]({GUARANTEES}).

{_accepted(config)}

{program}"""


def _onnx(config: dict[str, Any]) -> str:
    opset = config["files"]["model.onnx"]["opset"]
    program = _program(
        config,
        "import numpy as np\nimport onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})',
    )
    return f"""\
### `model.onnx`

The function with its weights inside, in opset {opset}. It needs
`pip install onnxruntime`, and to open photos `pillow`.

{_accepted(config)}

{program}"""


def _safetensors(_: dict[str, Any]) -> str:
    return """\
### `model.safetensors`

The weights alone, by the names and in the layouts of the authors' PyTorch release. With the package
`activemlp_jax`:

```python
import activemlp_jax as am

variables = am.load_torch_checkpoint("model.safetensors")  # flax variables, bit for bit
```

`python convert_torch_weights.py model.safetensors MODEL_DIR` makes a model directory of it, for
`am.load_pretrained(MODEL_DIR)` and every command of the package."""


# By format: makes the section from the content of `config.json`.
USAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "stablehlo": _stablehlo,
    "safetensors": _safetensors,
    "onnx": _onnx,
}
