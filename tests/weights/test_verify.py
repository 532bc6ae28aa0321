"""The flax and PyTorch implementations agree on weights and images that no golden has."""

from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import activemlp_jax as am
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP

SEED = 7  # gives other weights than those of the goldens


def torch_model(name: str, state_dict: dict[str, np.ndarray]) -> TorchActiveMLP:
    model = TorchActiveMLP(**VARIANTS[name]).double()
    model.load_state_dict({key: torch.tensor(value) for key, value in state_dict.items()})
    return model


def images(height: int, width: int) -> np.ndarray:
    return goldens.normal(SEED, f"{height}x{width}", (1, height, width, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", am.list_models())
def test_flax_and_pytorch_agree_at_two_sizes(name: str):
    state_dict = goldens.rule_state_dict(goldens.official_shapes(name), SEED)
    reference = torch_model(name, state_dict)
    model = am.create_model(name, dtype=jnp.float64)
    variables = jax.tree.map(jnp.asarray, am.from_torch(state_dict, model))
    apply = jax.jit(model.apply)
    for height, width in ((64, 64), (97, 130)):
        inputs = images(height, width)
        with torch.inference_mode():
            theirs = reference(torch.tensor(inputs)).numpy()
        goldens.assert_close(apply(variables, inputs), theirs, 1e-9, f"{name} {height}x{width}")


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_flax_and_pytorch_agree_on_the_gradients_of_all_parameters():
    name = "active_xtiny"
    state_dict = goldens.rule_state_dict(goldens.official_shapes(name), SEED)
    inputs, cotangent = images(64, 96), goldens.normal(SEED, "cotangent", (1, 1000))
    reference = torch_model(name, state_dict)
    reference(torch.tensor(inputs)).backward(torch.tensor(cotangent))

    model = am.create_model(name, dtype=jnp.float64)
    variables = jax.tree.map(jnp.asarray, am.from_torch(state_dict, model))

    def loss(variables: Any) -> jax.Array:
        return (model.apply(variables, inputs) * cotangent).sum()

    gradients = am.to_torch(jax.jit(jax.grad(loss))(variables))
    theirs = {key: value.grad.numpy() for key, value in reference.named_parameters()}
    assert set(gradients) == set(theirs)
    for key, gradient in gradients.items():
        goldens.assert_close(gradient, theirs[key], 1e-9, key)
