"""The part of a model card that says how to load a file, by format; each piece of code runs."""

from collections.abc import Callable
from typing import Any

GUARANTEES = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
# From a photo to the names of what is seen in it.
PROGRAM = """\
```python
import json
from pathlib import Path

{imports}
from PIL import Image

config = json.loads(Path("config.json").read_text())
shown, names = config["preprocessing"], config["classes"]["names"]
{load}

photo = Image.open("photo.jpg").convert("RGB")
side = {side}
{fit}
box = left, top, left + side, top + side
pixels = np.asarray(photo.crop(box), np.float32)[None]  # [batch, height, width, RGB]
images = (pixels / 255 - np.float32(shown["mean"])) / np.float32(shown["std"])
{run}  # [{shape}]
{answer}
```"""
# How a photo is resized and where it is cut, by task.
WHOLE = """\
short = int(shown["resize_factor"] * side)
width, height = (int(short * length / min(photo.size)) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BICUBIC)
left, top = round((width - side) / 2), round((height - side) / 2)"""
FITTED = """\
factor = min(shown["long_side"] / max(photo.size), shown["short_side"] / min(photo.size))
width, height = (round(factor * length) for length in photo.size)
photo = photo.resize((width, height), Image.Resampling.BILINEAR)
"""
WINDOW = "left, top = ((length - side) // 2 for length in photo.size)  # one window of many"
BEST = """\
scores = np.exp(logits[0] - np.max(logits[0]))
for label in np.argsort(-scores)[:5]:
    print({name}, f"{{scores[label] / scores.sum():.1%}}")"""
SHARES = """\
labels, counts = np.unique(np.argmax(logits[0], axis=-1), return_counts=True)
for label, count in zip(labels, counts):
    print({name}, f"{{count / counts.sum():.1%}}")"""


def _program(found: dict[str, Any], imports: str, load: str, run: str) -> str:
    shown = found["preprocessing"]
    if found["task"] == "segmentation":
        fit, answer = (FITTED if shown["long_side"] else "") + WINDOW, SHARES
    else:
        fit, answer = WHOLE, BEST
    return PROGRAM.format(
        imports=imports,
        load=load,
        run=run,
        side='shown["window"]' if found["task"] == "segmentation" else 'shown["image_size"]',
        fit=fit,
        shape=", ".join(map(str, found["output"]["shape"])),
        answer=answer.format(name="names[label]" if found["classes"]["names"] else "label"),
    )


def _accepted(found: dict[str, Any]) -> str:
    """What the function takes, and what becomes of anything else, in words."""
    shape = ", ".join(map(str, found["input"]["shape"]))
    return (
        f"It takes `[{shape}]` {found['input']['dtype']}, a batch of any size. Another dtype, "
        "image size or order of axes is refused, with an error that says what was expected."
    )


def _stablehlo(found: dict[str, Any]) -> str:
    facts = found["files"]["model.stablehlo"]
    platforms = ", ".join(facts["platforms"])
    program = _program(
        found,
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

{_accepted(found)}

{program}"""


def _onnx(found: dict[str, Any]) -> str:
    opset = found["files"]["model.onnx"]["opset"]
    program = _program(
        found,
        "import numpy as np\nimport onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})',
    )
    return f"""\
### `model.onnx`

The function with its weights inside, in opset {opset}. It needs
`pip install onnxruntime`, and to open photos `pillow`.

{_accepted(found)}

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


# By format, of the content of a `config.json`.
USAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "stablehlo": _stablehlo,
    "safetensors": _safetensors,
    "onnx": _onnx,
}
