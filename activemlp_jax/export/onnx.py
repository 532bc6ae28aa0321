"""Export to ONNX with PyTorch's exporter, from the PyTorch implementation of the same model.

This needs PyTorch, onnx and onnxscript, which are the optional dependencies [onnx].
"""

import contextlib
import itertools
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.torch_files import DESCRIPTION, as_tensor
from activemlp_jax.weights.torch_names import to_torch

OPSET = 20  # first version with GELU


def write_onnx(
    path: Path, card: ModelCard, variables: Variables, image_size: int
) -> dict[str, Any]:
    """Write the inference function of a model, with its weights, as an ONNX file.

    The function takes `images` `[batch, image_size, image_size, 3]` float32, normalized, in batches
    of any size. It returns `logits` float32, as `card.model.apply` does. The file's metadata has
    the content of the card.

    Returns facts that are needed to run the file, as JSON values.
    """
    import torch

    from activemlp_jax.weights.verify import torch_model

    # The exporter warns about its own code, and about packages that we do not need.
    logger = logging.getLogger("torch.onnx")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        network = torch_model(card.model).eval()
        network.load_state_dict(
            {name: as_tensor(value) for name, value in to_torch(variables).items()}
        )
        network.register_module("auxiliary_head", None)  # only for training
        program = torch.onnx.export(
            network,
            (torch.zeros(2, image_size, image_size, 3),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "dynamo always returns a program"
    content = program.model_proto
    # Remove the names and line numbers of local files.
    graph = content.graph
    parts = (graph.node, graph.value_info, graph.input, graph.output, graph.initializer)
    for part in (graph, *itertools.chain(*parts)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    content.metadata_props.add(key=DESCRIPTION, value=json.dumps(card.to_json()))
    path.write_bytes(content.SerializeToString())
    return {"opset": OPSET, "torch": torch.__version__}
