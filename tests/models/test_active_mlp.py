"""The network: equality to the original, parameter counts, initial weights and bad input."""

import re
from collections import Counter
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import activemlp_jax as am
from activemlp_jax.models.active_mlp import Block, Stage
from activemlp_jax.models.layers import Mlp
from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP

VARIANT_SIZES = [(name, 224) for name in am.list_models()] + [("active_large", 384)]
PARAMETERS = {
    "active_xtiny": 15_349_128,
    "active_tiny": 27_152_232,
    "active_small": 38_631_448,
    "active_base": 52_154_792,
    "active_large": 76_238_032,
}


def micro(**changes: Any) -> am.ActiveMLP:
    return am.ActiveMLP(**{**goldens.MICRO, **changes})


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", am.list_models())
def test_parameter_counts_are_the_originals(name: str):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(am.create_model(name).init, jax.random.key(0), images)
    assert count(variables["params"]) == PARAMETERS[name]


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("case", ["square", "odd"])
def test_micro_model_equals_the_original(case: str, dtype: str, bound: float):
    golden = goldens.load(f"micro_{case}.npz")
    with jax.enable_x64(dtype == "float64"):
        model = micro(dtype=jnp.dtype(dtype))
        variables = goldens.rule_variables(model)
        images = jnp.asarray(goldens.golden_input(f"micro_{case}.npz", "input"), dtype)
        logits, state = jax.jit(
            lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"])
        )(variables, images)
        assert logits.dtype == dtype
        goldens.assert_close(logits, golden["logits"], bound, "logits")
        stem = state["intermediates"]["stem"]["__call__"][0]
        goldens.assert_close(stem, golden["patch_embed"], bound, "stem")


def torch_micro_gradients() -> tuple[torch.Tensor, torch.Tensor, dict[str, np.ndarray]]:
    """Compute logits and gradients of the input and all parameters with PyTorch in float64."""
    model = TorchActiveMLP(**goldens.MICRO).double()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = goldens.rule_state_dict(shapes)
    model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    images = torch.tensor(goldens.golden_input("micro_square.npz", "input"), requires_grad=True)
    logits = model(images)
    logits.backward(torch.tensor(goldens.golden_input("micro_square.npz", "cotangent")))
    gradients = {key: value.grad.numpy() for key, value in model.named_parameters()}
    return logits.detach(), images.grad, gradients


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-4)])
def test_micro_model_gradients_equal_the_original(dtype: str, bound: float):
    # The goldens have only the input's gradient. For the parameters, the reference is the gradient
    # of our PyTorch model, after that has reproduced the goldens.
    golden = goldens.load("micro_square.npz")
    reference_logits, reference_by_images, reference = torch_micro_gradients()
    goldens.assert_close(reference_logits, golden["logits"], 1e-12, "PyTorch logits")
    goldens.assert_close(reference_by_images, golden["grad/input"], 1e-12, "PyTorch input")

    with jax.enable_x64(dtype == "float64"):
        model = micro(dtype=jnp.dtype(dtype))
        images = jnp.asarray(goldens.golden_input("micro_square.npz", "input"), dtype)
        cotangent = jnp.asarray(goldens.golden_input("micro_square.npz", "cotangent"), dtype)

        def loss(variables: Any, images: jax.Array) -> jax.Array:
            return (model.apply(variables, images) * cotangent).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        by_variables, by_images = gradient(goldens.rule_variables(model), images)
    goldens.assert_close(by_images, golden["grad/input"], bound, "input")
    gradients = am.to_torch(by_variables)
    assert set(gradients) == set(reference)
    for name, gradient in gradients.items():
        goldens.assert_close(gradient, reference[name], bound, name)


@lru_cache(maxsize=1)  # keep one, because they are large
def full_variables(name: str) -> dict[str, Any]:
    """Return the golden variables of a model as numpy arrays of float64."""
    with jax.enable_x64(True):
        variables = goldens.rule_variables(am.create_model(name, dtype=jnp.float64))
    return jax.tree.map(np.asarray, variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "dtype", "bound"),
    [
        # Run the cases of a model in one process, to make its weights once.
        pytest.param(*case, marks=pytest.mark.xdist_group(case[0]))
        for case in sorted(
            [
                *((name, size, "float64", 1e-9) for name, size in VARIANT_SIZES),
                *((name, 224, "float32", 1e-4) for name in am.list_models()),
                *((name, 224, "bfloat16", 5e-2) for name in am.list_models()),
            ]
        )
    ],
)
def test_full_models_equal_the_original(name: str, size: int, dtype: str, bound: float):
    file = f"{goldens.ORIGINAL_NAMES[name]}_{size}.npz"
    with jax.enable_x64(dtype == "float64"):
        model = am.create_model(name, dtype=jnp.dtype(dtype))
        kept = jnp.promote_types(dtype, jnp.float32)
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, kept), full_variables(name))
        images = jnp.asarray(goldens.golden_input(file, "input"), dtype)
        logits = jax.jit(model.apply)(variables, images)
        assert logits.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        goldens.assert_close(logits, goldens.load(file)["logits"], bound, f"{name} {dtype}")


def test_features_are_the_four_maps_before_downsampling():
    model = micro()
    images = goldens.normal(0, "features", (2, 70, 94, 3)).astype(np.float32)
    variables = goldens.rule_variables(model)
    maps = jax.jit(partial(model.apply, method="features"))(variables, images)
    assert [m.shape for m in maps] == [
        (2, 17, 23, 8),
        (2, 9, 12, 16),
        (2, 5, 6, 24),
        (2, 3, 3, 32),
    ]
    # The head applies layer norm, mean and a linear layer to the last map.
    params = variables["params"]
    last = np.asarray(maps[-1], np.float64)
    scale, bias = (params["norm"][key][None] for key in ("scale", "bias"))
    norm = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    pooled = norm.mean((1, 2)) * scale + bias
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"][None]
    ours = jax.jit(model.apply)(variables, images)
    goldens.assert_close(ours, np.asarray(logits), 1e-5, "logits")


def test_thirty_two_pixels_are_enough():
    model = micro()
    logits = jax.eval_shape(model.apply, goldens.rule_variables(model), jnp.zeros((1, 32, 32, 3)))
    assert logits.shape == (1, 10)


def test_bfloat16_model_keeps_float32_parameters_and_logits():
    model = micro(dtype=jnp.bfloat16)
    images = jnp.ones((1, 32, 32, 3))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    features = partial(model.apply, method="features")
    maps = jax.eval_shape(features, variables, images)
    assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}


def test_products_over_positions_of_a_bfloat16_model_are_of_bfloat16_but_for_offsets():
    model = micro(dtype=jnp.bfloat16)
    variables = goldens.rule_variables(micro())
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.bfloat16)

    def total(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images).sum()

    program = jax.jit(jax.grad(total)).lower(variables, images).as_text()
    operands = re.findall(
        r"stablehlo\.(?:dot_general|convolution)\b.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)",
        program,
    )
    kinds = Counter(operands)
    assert set(kinds) == {("bf16", "bf16"), ("f32", "f32")}, kinds
    offset_layers = sum((depth - 2) // model.offset_interval + 1 for depth in model.depths)
    # Products without positions: two per block for the mixing weights, in the first stage one more
    # for their input and one for the biases; and one for the logits.
    per_image = 2 * sum(model.depths) + 2 * model.depths[0] + 1
    # Each product has one in the forward and two in the backward pass, one per operand.
    assert kinds["f32", "f32"] <= 3 * (offset_layers + per_image), kinds
    assert kinds["bf16", "bf16"] > 100, kinds


def test_drop_path_rates_grow_linearly_over_all_blocks():
    model = micro(drop_path_rate=0.3)
    stages = model.bind(goldens.rule_variables(model)).stages
    rates = [rate for stage in stages for rate in stage.drop_path_rates]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 11), rtol=1e-12)


def test_drop_path_keeps_or_drops_whole_samples_and_scales_by_one_over_keep():
    # One stage of 1x1 maps, with equal samples. Its second block has two branches, each kept with
    # probability 3/4 and then scaled by 4/3: four results with known shares and a known maximum.
    rate, samples = 0.25, 8192
    stage = Stage(32, 4, 8, 1, (0.0, rate))
    x = jnp.tile(
        jnp.asarray(goldens.normal(0, "stage", (1, 1, 1, 32)), jnp.float32), (samples, 1, 1, 1)
    )
    variables = jax.jit(stage.init, static_argnums=2)(jax.random.key(0), x[:1], False)
    dropped = jax.jit(stage.apply, static_argnums=2)(
        variables, x, True, rngs={"dropout": jax.random.key(1)}
    )
    _, counts = np.unique(
        np.asarray(dropped).reshape(samples, -1).round(4), axis=0, return_counts=True
    )
    np.testing.assert_allclose(
        sorted(counts / samples), [1 / 16, 3 / 16, 3 / 16, 9 / 16], atol=0.02
    )

    first_alone = Stage(32, 4, 8, 1, (0.0, 1 - 1e-7)).apply(
        variables, x[:1], True, rngs={"dropout": jax.random.key(1)}
    )
    block = variables["params"]["block_1"]
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": block["norm2"]}, first_alone)
    branch = Mlp(128, 32).apply({"params": block["mlp"]}, normed)
    only_mlp = first_alone + branch / (1 - rate)
    distance = np.abs(np.asarray(dropped) - only_mlp).max(axis=(1, 2, 3))
    assert abs((distance < 1e-5).mean() - 3 / 16) < 0.02, "no sample has the scaled MLP alone"


def test_initial_weights_have_the_originals_spread():
    params = jax.jit(am.create_model("active_xtiny").init)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    state_dict = am.to_torch(params)
    for name, value in state_dict.items():
        if name.endswith("bias"):
            assert not value.any(), f"{name} is not zero"
        elif value.ndim == 1:
            assert (value == 1).all(), f"{name} is not one"
        elif value.size > 4000:
            is_conv = ".proj.weight" in name and value.ndim == 4
            fan_out = value.shape[0] * np.prod(value.shape[2:])
            expected = np.sqrt(2 / fan_out) if is_conv else 0.02
            if name.startswith("pos_blocks"):
                expected = np.sqrt(2 / 9)
            error = abs(value.std() / expected - 1)
            assert error < 0.06, f"{name}: standard deviation off by {error:.1%}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2, 1, 4, 2)}, r"stage 1 has 1 block, expected at least 2"),
        ({"depths": (2, 2, 2)}, r"depths is \(2, 2, 2\), expected four values"),
        ({"depths": (2, 2, "x", 2)}, "expected positive integers"),
        ({"share_dims": (3, 4, 4, 8)}, r"8 channels of stage 0.*share_dims value 3"),
        ({"mlp_ratios": (4, 4, 0, 2)}, "expected positive numbers"),
        ({"embed_dims": (2, 16, 24, 32)}, "stage 0 needs at least 4"),
        ({"offset_interval": 0}, "offset_interval is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ],
)
def test_fields_that_fit_no_model_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        micro(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 31, 64, 3), r"\(1, 31, 64, 3\), expected sides of at least 32"),
        ((1, 64, 64, 1), r"shape \(1, 64, 64, 1\), expected \[B, H, W, 3\](\n|$)"),
        ((64, 64, 3), r"shape \(64, 64, 3\), expected \[B, H, W, 3\](\n|$)"),
        ((1, 3, 64, 64), r"expected \[B, H, W, 3\]; channels come last: images\.transpose\("),
    ],
)
def test_images_of_another_shape_are_refused_with_their_shape(shape: Any, message: str):
    with pytest.raises(ValueError, match=message):
        micro().init(jax.random.key(0), jnp.zeros(shape))


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'active_huge'.*active_base, active_large"):
        am.create_model("active_huge")


@pytest.mark.usefixtures("float64")
def test_a_plain_block_has_forward_mode_and_second_derivatives():
    block = Block(4, 2, 2, True, 0.0, jnp.float64, jnp.float64, plain=True)
    x = jnp.asarray(goldens.normal(0, "block", (1, 3, 4, 4)))
    variables = jax.jit(block.init, static_argnums=(2, 3))(jax.random.key(0), x, None, False)
    apply = jax.jit(lambda variables, x: block.apply(variables, x, None, False)[0])
    check_grads(apply, (variables, x), order=2, modes=["fwd", "rev"], eps=1e-4)


@pytest.mark.parametrize("plain", [True, False])
def test_a_plain_model_has_no_derivative_rules(plain: bool):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = str(jax.make_jaxpr(micro(plain=plain).apply)(goldens.rule_variables(micro()), images))
    assert ("custom_vjp" in program) != plain


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "kept"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float64, None, jnp.float64),
        (jnp.float32, jnp.float64, jnp.float64),
    ],
)
@pytest.mark.usefixtures("float64")
def test_parameters_and_logits_are_float32_or_wider(dtype: Any, param_dtype: Any, kept: Any):
    model = micro(dtype=dtype, param_dtype=param_dtype)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits = jax.eval_shape(model.apply, variables, images)
    maps = jax.eval_shape(partial(model.apply, method="features"), variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(kept)}
    assert (logits.dtype, maps[0].dtype) == (kept, dtype)


def test_parameters_narrower_than_float32_are_refused():
    with pytest.raises(ValueError, match="param_dtype is bfloat16, expected float32 or wider"):
        micro(param_dtype=jnp.bfloat16).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.usefixtures("float64")
def test_a_stage_computed_again_has_the_same_gradients_and_drops_the_same_samples():
    plain = Stage(8, 2, 4, 2, (0.0, 0.5), jnp.float64, jnp.float64)
    again = plain.clone(remat=True)
    x = jnp.asarray(goldens.normal(0, "stage", (8, 5, 5, 8)))
    variables = jax.jit(plain.init, static_argnums=2)(jax.random.key(0), x, False)

    def loss(stage: Stage, variables: Any) -> jax.Array:
        return (stage.apply(variables, x, True, rngs={"dropout": jax.random.key(1)}) ** 2).sum()

    expected, ours = (
        jax.jit(jax.grad(partial(loss, stage)))(variables) for stage in (plain, again)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("stages", [(), (1,), (0, 2)])
def test_both_halves_of_each_block_asked_for_are_computed_again(stages: tuple[int, ...]):
    model = micro(remat_stages=stages)
    variables = goldens.rule_variables(micro())
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), images)
    ) == jax.tree.structure(variables)
    operations = [str(eqn.primitive) for eqn in jax.make_jaxpr(model.apply)(variables, images).eqns]
    assert operations.count("remat2") == 2 * sum(micro().depths[stage] for stage in stages)


def test_a_half_computed_again_gives_all_its_cotangents_at_once():
    stage = Stage(8, 2, 4, 2, (0.0, 0.0), remat=True)
    x = jnp.zeros((1, 4, 4, 8))
    variables = jax.eval_shape(partial(stage.init, train=False), jax.random.key(0), x)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        return stage.apply(variables, x, False).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x)
    halves = [
        eqn.params["jaxpr"]
        for eqn in program.eqns
        if str(eqn.primitive) == "remat2" and eqn.params["differentiated"]
    ]
    assert len(halves) == 4
    for half in halves:
        made_by = {variable: eqn for eqn in half.eqns for variable in eqn.outvars}
        last = {made_by[variable] for variable in half.outvars}
        assert [str(eqn.primitive) for eqn in last] == ["optimization_barrier"], last
