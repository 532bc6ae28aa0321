"""The operator `sample_axis`: its values, gradients and edges, for every implementation."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from activemlp_jax import sample_axis
from activemlp_jax.ops import pallas_gpu
from activemlp_jax.ops.sample_axis import NAMES

IMPLS = list(NAMES)
KERNELS = ["pallas_tpu", "pallas_gpu"]  # these support only float32, and are interpreted here
IN_FLOAT64 = [impl for impl in IMPLS if impl not in KERNELS]
AXES = ["h", "w"]


def triple_loop(x: np.ndarray, offset: np.ndarray, cotangent: np.ndarray, axis: str) -> Any:
    """Compute the value and both gradients of the definition element by element in numpy."""
    batch, height, width, channels = x.shape
    length = height if axis == "h" else width
    share = channels // offset.shape[-1]
    y, grad_x, grad_offset = np.zeros_like(x), np.zeros_like(x), np.zeros_like(offset)

    def place(b: int, i: int, j: int, k: int, c: int) -> tuple[int, int, int, int]:
        return (b, k, j, c) if axis == "h" else (b, i, k, c)

    for b, i, j, c in np.ndindex(batch, height, width, channels):
        position = (i if axis == "h" else j) + offset[b, i, j, c // share]
        floor = np.floor(position)
        fraction = position - floor
        neighbours = []
        for k, weight in ((floor, 1 - fraction), (floor + 1, fraction)):
            value = 0.0
            if 0 <= k < length:
                where = place(b, i, j, int(k), c)
                value = x[where]
                grad_x[where] += weight * cotangent[b, i, j, c]
            y[b, i, j, c] += weight * value
            neighbours.append(value)
        slope = neighbours[1] - neighbours[0]
        grad_offset[b, i, j, c // share] += slope * cotangent[b, i, j, c]
    return y, grad_x, grad_offset


@partial(jax.jit, static_argnums=(3, 4))
def value_and_gradients(
    x: np.ndarray, offset: np.ndarray, cotangent: np.ndarray, axis: str, impl: str
) -> Any:
    y, pullback = jax.vjp(lambda x, o: sample_axis(x, o, axis, impl), x, offset)
    return y, *pullback(jnp.asarray(cotangent, y.dtype))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw shapes, group sizes, and offsets that include integers and positions past both edges."""
    batch, height, width = (draw(st.integers(1, most)) for most in (2, 6, 6))
    groups, share = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (batch, height, width, groups * share)
    span = max(height, width)
    special = [float(k) for k in range(-span - 1, span + 2)] + [1e6, -1e6, 1e30, -1e30, 0.5]
    offsets = st.one_of(st.sampled_from(special), st.floats(-span - 2, span + 2, width=32))
    # Positions on a grid of 1 / 64 are exact, so both implementations floor to the same pixel.
    offset = draw(hnp.arrays(np.float64, (batch, height, width, groups), elements=offsets))
    near = np.abs(offset) < 1e5
    offset = np.where(near, np.round(np.where(near, offset, 0) * 64) / 64, offset)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.standard_normal(shape), offset, rng.standard_normal(shape)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", ["auto", *IN_FLOAT64])
@pytest.mark.parametrize("axis", AXES)
def test_values_and_gradients_equal_the_original(axis: str, impl: str):
    golden = goldens.load("atm_op.npz")
    results = value_and_gradients(golden["x"], golden["offset"], golden["cotangent"], axis, impl)
    for name, ours in zip(("y", "grad_x", "grad_offset"), results, strict=True):
        goldens.assert_close(ours, golden[f"{axis}/{name}"], 1e-9, f"{axis}/{name}")


@pytest.mark.parametrize("impl", ["auto", *KERNELS])
@pytest.mark.parametrize("axis", AXES)
def test_values_and_gradients_equal_the_original_in_float32(axis: str, impl: str):
    golden = goldens.load("atm_op.npz")
    arrays = [golden[key].astype(np.float32) for key in ("x", "offset", "cotangent")]
    results = value_and_gradients(*arrays, axis, impl)
    for name, ours in zip(("y", "grad_x", "grad_offset"), results, strict=True):
        assert ours.dtype == jnp.float32
        goldens.assert_close(ours, golden[f"{axis}/{name}"], 1e-4, f"{axis}/{name}")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("axis", AXES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases())
def test_values_and_gradients_equal_a_triple_loop(axis: str, case: Any):
    """Each example has a new shape, so all implementations are compiled in one program."""
    expected = triple_loop(*case, axis)
    impls = [impl for impl in NAMES if impl not in KERNELS]
    together = jax.jit(lambda *arrays: [value_and_gradients(*arrays, axis, impl) for impl in impls])
    for impl, results in zip(impls, together(*case), strict=True):
        for name, ours, reference in zip(("y", "x", "offset"), results, expected, strict=True):
            np.testing.assert_allclose(
                ours, reference, rtol=1e-12, atol=1e-12, err_msg=f"{impl}: {name}"
            )


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("axis", AXES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases())
def test_kernels_equal_a_triple_loop_in_float32(axis: str, impl: str, case: Any):
    expected = triple_loop(*case, axis)
    results = value_and_gradients(*(array.astype(np.float32) for array in case), axis, impl)
    for name, ours, reference in zip(("y", "x", "offset"), results, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_every_divisor_grouping_equals_repeated_offsets(axis: str, impl: str, groups: int):
    # Products and sums of these numbers are exact, so their order does not matter.
    rng = np.random.default_rng(groups)
    x = rng.integers(-50, 50, (2, 5, 4, 12)).astype(np.float32)
    offset = rng.integers(-400, 400, (2, 5, 4, groups)).astype(np.float32) / 64
    repeated = np.repeat(offset, 12 // groups, axis=-1)
    np.testing.assert_array_equal(
        sample_axis(x, offset, axis, impl), sample_axis(x, repeated, axis, impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", AXES)
def test_gradient_at_exact_integers_is_the_right_hand_difference(axis: str, impl: str):
    x = np.arange(1.0, 26.0, dtype=np.float32).reshape(1, 5, 5, 1) ** 2
    offset = np.zeros_like(x)
    _, _, gradient = value_and_gradients(x, offset, np.ones_like(x), axis, impl)
    dimension = 1 if axis == "h" else 2
    padding = [(0, 0)] * 4
    padding[dimension] = (0, 1)
    expected = np.diff(np.pad(x, padding), axis=dimension)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("distance", [5.0, -6.0, 1e6, -1e6, 3e9, -3e9, 1e30, -1e30])
def test_offsets_outside_the_map_read_zero(axis: str, impl: str, distance: float):
    x = np.ones((1, 5, 5, 2), np.float32)
    offset = np.full((1, 5, 5, 1), distance, np.float32)
    for result in value_and_gradients(x, offset, x, axis, impl):
        np.testing.assert_array_equal(result, np.zeros_like(result))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_offset_gives_nan_there_and_nowhere_else(axis: str, impl: str, value: float):
    x = np.ones((2, 5, 5, 4), np.float32)
    offset = np.zeros((2, 5, 5, 2), np.float32)
    offset[1, 2, 3, 1] = value
    y, grad_x, _ = value_and_gradients(x, offset, x, axis, impl)
    expected = np.zeros(x.shape, bool)
    expected[1, 2, 3, 2:] = True
    np.testing.assert_array_equal(np.isnan(y), expected)
    assert np.isfinite(grad_x).all(), "a non-finite offset reads no feature"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_features_keep_float32_positions(impl: str, offset_dtype: Any):
    # At 60 pixels, bfloat16 has steps of a quarter pixel, so an eighth would be lost.
    x = jnp.arange(64.0, dtype=jnp.bfloat16).reshape(1, 1, 64, 1)
    offset = jnp.full((1, 1, 64, 1), 0.125, offset_dtype)
    sample = jax.jit(lambda x, o: sample_axis(x, o, "w", impl))
    y, slope = jax.value_and_grad(lambda o: sample(x, o)[0, 0, 32, 0] * 1.0)(offset)
    assert y.dtype == jnp.bfloat16
    assert slope.dtype == offset_dtype
    exact = sample(x.astype(jnp.float32), offset)
    np.testing.assert_array_equal(exact[0, 0, :63, 0], np.arange(63) + 0.125)
    np.testing.assert_array_equal(sample(x, offset), exact.astype(jnp.bfloat16))
    assert slope[0, 0, 32, 0] == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", AXES)
def test_a_map_over_examples_gives_what_a_batch_does(axis: str, impl: str):
    rng = np.random.default_rng(0)
    x, offset = (rng.standard_normal((3, 4, 5, size)).astype(np.float32) for size in (6, 2))
    cotangent = rng.standard_normal(x.shape).astype(np.float32)

    def one(*arrays: jax.Array) -> Any:
        return value_and_gradients(*(array[None] for array in arrays), axis, impl)

    mapped = jax.vmap(one)(x, offset, cotangent)
    for ours, expected in zip(
        mapped, value_and_gradients(x, offset, cotangent, axis, impl), strict=True
    ):
        np.testing.assert_allclose(ours[:, 0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "present", "absent"),
    [
        ("cpu", ["gather", "scatter"], ["tpu_custom_call", "triton"]),
        ("tpu", ["tpu_custom_call"], ["gather", "scatter", "triton"]),
        ("cuda", ["triton"], ["gather", "scatter", "tpu_custom_call"]),
        ("rocm", ["gather"], ["scatter", "tpu_custom_call", "triton"]),
    ],
)
def test_a_program_has_the_form_for_its_platform(
    platform: str, present: list[str], absent: list[str]
):
    shapes = [jax.ShapeDtypeStruct((2, 8, 8, c), jnp.float32) for c in (8, 4, 8)]
    traced = value_and_gradients.trace(*shapes, "w", "auto")
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for name in present:
        assert name in text
    for name in absent:
        assert name not in text


@pytest.mark.parametrize(
    ("capability", "runs"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", True)]
)
def test_kernels_are_left_to_gpus_that_they_are_made_for(
    capability: str, runs: bool, monkeypatch: pytest.MonkeyPatch
):
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert pallas_gpu.runs_here() == runs


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_refuse_float64(impl: str):
    x = np.zeros((1, 2, 2, 2))
    with pytest.raises(ValueError, match=f"'{impl}' computes in float32, not in float64"):
        sample_axis(x, x, "h", impl)


@pytest.mark.parametrize(
    ("x_shape", "offset_shape", "axis", "impl", "message"),
    [
        ((2, 4, 4, 6), (2, 4, 4, 4), "h", "auto", r"4 groups.*6 channels.*\(2, 4, 4, 6\)"),
        ((2, 4, 4, 6), (2, 4, 4, 0), "h", "auto", "0 groups"),
        ((2, 4, 4, 6), (2, 4, 5, 6), "h", "auto", r"\(2, 4, 5, 6\).*\(2, 4, 4, 6\)"),
        ((2, 4, 4, 6), (2, 4, 6), "h", "auto", r"rank 3 \(shape \(2, 4, 6\)\) but expected 4"),
        ((2, 4, 4, 6), (2, 4, 4, 6), "x", "auto", "axis is 'x'"),
        ((2, 4, 4, 6), (2, 4, 4, 6), "h", "magic", "impl is 'magic'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    x_shape: Any, offset_shape: Any, axis: str, impl: str, message: str
):
    with pytest.raises(ValueError, match=message):
        sample_axis(jnp.zeros(x_shape), jnp.zeros(offset_shape), axis, impl)
