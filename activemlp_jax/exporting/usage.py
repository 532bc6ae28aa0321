"""The part of a model card that says how to load a file, by format; each piece of code runs."""

from collections.abc import Callable
from typing import Any

GUARANTEES = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
# What is done with `images`, from the line that loads a file to its `logits`.
PROGRAM = """\
```python
import json
from pathlib import Path

{imports}

config = json.loads(Path("config.json").read_text())
{load}

pixels = np.zeros((1, {side}, {side}, 3), np.uint8)  # [batch, height, width, RGB]
mean, std = (np.float32(config["preprocessing"][name]) for name in ("mean", "std"))
images = (pixels.astype(np.float32) / 255 - mean) / std
{run}  # [{shape}]
labels = np.argmax(logits, axis=-1)
```"""


def _program(found: dict[str, Any], imports: str, load: str, run: str) -> str:
    shape = ", ".join(map(str, found["output"]["shape"]))
    side = found["input"]["shape"][1]
    return PROGRAM.format(imports=imports, load=load, run=run, shape=shape, side=side)


def _stablehlo(found: dict[str, Any]) -> str:
    facts = found["files"]["model.stablehlo"]
    program = _program(
        found,
        "import jax\nimport jax.export\nimport numpy as np",
        'exported = jax.export.deserialize(Path("model.stablehlo").read_bytes())\n'
        "program = jax.jit(exported.call)",
        "logits = program(images)",
    )
    return f"""\
### `model.stablehlo`

The function with its weights inside, for batches of any size on {", ".join(facts["platforms"])}. It
needs `pip install jax flatbuffers` and no other package. It was written by jax {facts["jax"]}, and
JAX says [for how long others read it]({GUARANTEES}).

{program}"""


def _onnx(found: dict[str, Any]) -> str:
    program = _program(
        found,
        "import numpy as np\nimport onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})',
    )
    return f"""\
### `model.onnx`

The function with its weights inside, for batches of any size, in opset
{found["files"]["model.onnx"]["opset"]}.

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
