"""Conversion of PyTorch state dicts to flax variables and back is complete, exact and strict."""

import tracemalloc
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import activemlp_jax as am
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.weights.torch_names import infer_architecture, infer_model, variable_shapes


def micro_state_dict() -> dict[str, np.ndarray]:
    return goldens.rule_state_dict(goldens.torch_shapes(am.ActiveMLP(**goldens.MICRO)))


@pytest.mark.parametrize("name", am.list_models())
def test_released_keys_convert_both_ways_bit_for_bit(name: str):
    rng = np.random.default_rng(0)
    shapes = goldens.official_shapes(name)
    state_dict = {key: rng.random(shape, np.float32) for key, shape in shapes.items()}
    model = am.create_model(name)
    back = am.to_torch(am.from_torch(state_dict, model))
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", am.list_models())
def test_architecture_is_read_off_the_shapes(name: str):
    state_dict = {key: np.empty(shape) for key, shape in goldens.official_shapes(name).items()}
    assert infer_model(state_dict) == am.create_model(name)


def test_the_architecture_of_weights_without_a_head_is_read_off_too():
    shapes = goldens.official_shapes("active_base").items()
    state_dict = {f"x.{key}": np.empty(shape) for key, shape in shapes if "head" not in key}
    assert infer_architecture(state_dict, "x.") == VARIANTS["active_base"]


def test_an_odd_mlp_ratio_is_inferred_to_the_same_hidden_width():
    for dim, hidden in [(12, 29), (24, 79), (96, 97), (40, 143)]:
        model = am.ActiveMLP((2,) * 4, (dim,) * 4, (hidden / dim + 1e-12,) * 4, (4,) * 4, 1)
        shapes = goldens.torch_shapes(model)
        state_dict = {key: np.empty(shape) for key, shape in shapes.items()}
        assert variable_shapes(infer_model(state_dict)) == variable_shapes(model)


def test_tensors_are_accepted_without_copying_through_lists():
    arrays = micro_state_dict()
    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    for ours, expected in zip(
        jax.tree.leaves(am.from_torch(tensors)),
        jax.tree.leaves(am.from_torch(arrays)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, expected)


def test_bfloat16_tensors_keep_their_type():
    tensors = {key: torch.tensor(value).bfloat16() for key, value in micro_state_dict().items()}
    variables = am.from_torch(tensors)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(jnp.bfloat16)}


def change(state_dict: dict[str, Any], **changes: Any) -> dict[str, Any]:
    state_dict = dict(state_dict)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state_dict[name]
        else:
            state_dict[name] = value
    return state_dict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm__weight": None}, r"1 missing \(norm\.weight\)$"),
        ({"blocks__2__1__mlp__fc1__bias": None}, r"missing \(blocks\.2\.1\.mlp\.fc1\.bias\)"),
        ({"blocks__2__2__offset_layer__1__weight": None}, r"offset_layer\.1\.weight"),
        ({"extra": np.zeros(3)}, r"1 unknown \(extra\)$"),
        ({"head__bias": np.zeros(7)}, r"head.bias has shape \(7,\), the model expects \(10,\)"),
        ({"head__weight": None}, r"misses head\.weight"),
        ({"blocks__0__0__norm1__weight": None}, r"misses blocks\.0\.0\.norm1\.weight"),
        ({"norm__weight": None, "extra": np.zeros(3)}, r"missing \(norm.*unknown \(extra\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_key(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        am.from_torch(change(micro_state_dict(), **changes))


def sized(*shape: int) -> np.ndarray:
    """Make an array of any shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.float32), shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.999999999.x": sized(1)}, r"stage 0 has a block 999999999, but only 3 blocks"),
        ({f"blocks.0.{'9' * 5000}.x": sized(1)}, r"1 unknown \(blocks\.0\.9{91}\)$"),
        ({f"blocks.2.{j}.x": sized(1) for j in range(800)}, r"807 blocks, expected at most 500"),
        (
            {"blocks.3.0.norm1.weight": sized(2**40)},
            r"1,099,511,627,776 rows, expected at most",
        ),
        (
            {"head.weight": sized(2**30, 32)},
            r"head\.weight has 1,073,741,824 rows, expected at",
        ),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_a_model_is_made(changes: Any, message: str):
    with pytest.raises(ValueError, match=message) as error:
        am.from_torch(micro_state_dict() | changes)
    assert len(str(error.value)) < 1000


def test_tensors_of_bfloat16_are_not_widened_on_the_way():
    repeated = torch.zeros((), dtype=torch.bfloat16).expand(2**28)
    tensors = micro_state_dict() | {"head.bias": repeated}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"head.bias has shape \(268435456,\)"):
            am.from_torch(tensors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


def test_of_many_keys_that_do_not_fit_a_few_are_named():
    weights = micro_state_dict()
    renamed = {key.replace("norm1", "norm_1"): value for key, value in weights.items()}
    renamed |= {key: value for key, value in weights.items() if "0.norm1." in key}
    with pytest.raises(ValueError, match=r"keys 14 missing .* and 11 more\), 22 unknown") as error:
        am.from_torch(renamed, am.ActiveMLP(**goldens.MICRO))
    assert str(error.value).count("norm") == 6
    assert "an ActiveMLP of no published variant (depths (2, 3, 4, 2)" in str(error.value)


def test_weights_of_another_model_are_refused():
    shapes = goldens.official_shapes("active_xtiny")
    state_dict = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    dims = r"embed_dims \(64, 128, 320, 512\)"
    message = (
        rf"^the weights are of active_xtiny \(depths \(2, 2, 4, 2\), {dims}\), expected "
        rf"active_tiny \(depths \(2, 3, 10, 3\), {dims}\)$"
    )
    with pytest.raises(ValueError, match=message):
        am.from_torch(state_dict, am.create_model("active_tiny"))
    with pytest.raises(ValueError, match="expected active_xtiny under fpn"):
        am.from_torch(state_dict, am.create_segmentor("active_xtiny", "fpn"))
    with pytest.raises(ValueError, match=r"head\.bias has shape \(1000,\).*expects \(10,\)"):
        am.from_torch(state_dict, am.create_model("active_xtiny", num_classes=10))
    with pytest.raises(ValueError, match=r"empty"):
        am.from_torch({})


def test_to_torch_names_a_parameter_it_does_not_know():
    with pytest.raises(ValueError, match="no PyTorch name for the parameter surprise/kernel"):
        am.to_torch({"params": {"surprise": {"kernel": np.zeros((2, 2))}}})
