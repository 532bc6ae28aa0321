"""The segmentation models equal the original, with their statistics, to nine digits."""

from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.models.flops import count_cost
from activemlp_jax.models.heads import Classifier, FcnHead, FpnHead, FpnNeck, UperNetHead
from activemlp_jax.models.resizing import pool_adaptive, resize_bilinear, resize_nearest
from activemlp_jax.tasks.segmentation import pixel_cross_entropy

BOUND = 1e-9
HEADS = ("upernet", "fpn")
# Published GMACs of UperNet at 512 x 2048 and of Semantic FPN at 512 x 512.
PUBLISHED_GMACS = {
    "active_xtiny": (889.5, 33.1),
    "active_tiny": (926.9, 42.4),
    "active_small": (988.3, 57.8),
    "active_base": (1055.9, 74.7),
    "active_large": (1105.6, 86.6),
}


def micro(head: str, **fields: Any) -> am.ActiveSegmentor:
    return am.ActiveSegmentor(**{**goldens.SEG_MICRO[head], "dtype": jnp.float64, **fields})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("head", HEADS)
def test_features_logits_losses_and_statistics_are_the_originals(head: str):
    model, golden = micro(head, dropout_rate=0.0), goldens.load(f"seg_micro_{head}.npz")
    images = jnp.asarray(goldens.golden_input(f"seg_micro_{head}.npz", "input"))
    labels = jnp.asarray(golden["label"])
    has_aux = head == "upernet"

    @jax.jit
    def run(variables: Any, images: jax.Array) -> tuple[Any, Any, dict[str, Any]]:
        maps = model.apply(variables, images, method="features")
        found = model.apply(variables, images, return_aux=has_aux)
        trained, moved = model.apply(
            variables, images, train=True, return_aux=has_aux, mutable=["batch_stats"]
        )
        return maps, {"tested": found, "trained": trained}, moved

    variables = goldens.rule_variables(model)
    maps, found, moved = run(variables, images)
    for i, feature in enumerate(maps):
        goldens.assert_close(feature, golden[f"feature_{i}"], BOUND, f"feature {i}")
    tested, trained = found["tested"], found["trained"]
    if has_aux:
        (tested, auxiliary), (trained, trained_auxiliary) = tested, trained
        goldens.assert_close(auxiliary, golden["aux_logits"], BOUND, "auxiliary logits")
        loss = 0.4 * pixel_cross_entropy(trained_auxiliary, labels)
        goldens.assert_close(loss, golden["train/aux.loss_seg"], BOUND, "auxiliary loss")
    goldens.assert_close(tested, golden["logits"], BOUND, "logits")
    upsampled = resize_bilinear(tested, *images.shape[1:3])[:, ::8, ::8]
    goldens.assert_close(upsampled, golden["upsampled"], BOUND, "upsampled logits")
    loss = pixel_cross_entropy(trained, labels)
    goldens.assert_close(loss, golden["train/decode.loss_seg"], BOUND, "loss")
    if has_aux:
        statistics = goldens.load("seg_micro_running_stats.npz")
        ours = am.to_torch({"params": variables["params"], **moved})
        for name, expected in statistics.items():
            goldens.assert_close(ours[name], expected, BOUND, name)
        counts = [value for name, value in ours.items() if name.endswith("tracked")]
        assert [int(count) for count in counts] == [2] * 13


@pytest.mark.parametrize("backbone", am.list_models())
@pytest.mark.parametrize(("head", "height", "width"), [("upernet", 512, 2048), ("fpn", 512, 512)])
def test_parameters_are_the_originals_and_the_multiply_adds_near_the_published(
    backbone: str, head: str, height: int, width: int
):
    cost = count_cost(am.create_segmentor(backbone, head), height, width)
    name = f"{goldens.ORIGINAL_NAMES[backbone]}_{head}"
    assert cost.parameters == goldens.load_json("seg_param_counts.json")[name]
    published = PUBLISHED_GMACS[backbone][HEADS.index(head)]
    # The published counts include batch norms, ReLUs and pooling.
    assert cost.published_macs / 1e9 == pytest.approx(published, rel=0.01)
    assert cost.macs < cost.published_macs < published * 1e9


def test_only_upernet_has_an_auxiliary_head():
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"])
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert set(variables["params"]) >= {"active_mlp", "neck", "decode_head"}
    assert "auxiliary_head" not in variables["params"]
    with pytest.raises(ValueError, match="head 'fpn' has no auxiliary head"):
        jax.eval_shape(lambda v: model.apply(v, images, return_aux=True), variables)


@pytest.mark.parametrize("head", [UperNetHead, FpnHead, FcnHead])
def test_heads_start_as_the_originals(head: Any):
    maps = [jnp.zeros((1, side, side, 32)) for side in (8, 4, 2, 1)]
    variables = head(7, 64, 0.1).init(
        jax.random.key(0), maps[0] if head is FcnHead else maps, False
    )
    params, statistics = variables["params"], variables["batch_stats"]
    classifier = params["classifier"]["conv_seg"]
    assert float(classifier["kernel"].std()) == pytest.approx(0.01, rel=0.2)
    assert not classifier["bias"].any()
    block = {UperNetHead: "bottleneck", FpnHead: "scale_1_0", FcnHead: "hidden"}[head]
    kernel = params[block]["conv"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)  # fan out
    assert (params[block]["bn"]["scale"] == 1).all()
    assert (params[block]["bn"]["bias"] == 0).all()
    running = statistics[block]["bn"]
    assert (running["mean"] == 0).all()
    assert (running["var"] == 1).all()
    assert int(running["count"]) == 0


def test_the_neck_starts_as_the_originals():
    maps = [jnp.zeros((1, side, side, 32)) for side in (8, 4, 2, 1)]
    params = FpnNeck(16).init(jax.random.key(0), maps)["params"]
    kernel, limit = params["output_0"]["kernel"], (6 / (9 * 16 + 9 * 16)) ** 0.5
    assert float(jnp.abs(kernel).max()) == pytest.approx(limit, rel=0.01)
    assert float(kernel.std()) == pytest.approx(limit / 3**0.5, rel=0.05)
    assert not params["output_0"]["bias"].any()


def test_dropout_takes_whole_channels_and_only_in_training():
    """Logits are those without the dropped channels, and with the others scaled by 1 / keep."""
    classifier = Classifier(5, 0.5)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
    variables = classifier.init(jax.random.key(1), x, False)
    kernel = variables["params"]["conv_seg"]["kernel"][0, 0]
    dropped = classifier.apply(variables, x, True, rngs={"dropout": jax.random.key(2)})
    kept = np.linalg.lstsq(  # for each sample, the share of each channel that explains the logits
        *_system(np.asarray(x[0]), np.asarray(kernel), np.asarray(dropped[0])), rcond=None
    )[0]
    np.testing.assert_allclose(kept[kept > 1e-3], 2.0, rtol=1e-2)
    assert 0 < (kept > 1e-3).sum() < 16
    plain = classifier.apply(variables, x, False)
    goldens.assert_close(plain, np.asarray(x @ kernel), 1e-5, "without dropout")


def _system(x: np.ndarray, kernel: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set up linear equations for the factor of each channel, one per position and class."""
    return np.einsum("hwc,ck->hwkc", x, kernel).reshape(-1, x.shape[-1]), logits.reshape(-1)


def test_in_bfloat16_statistics_and_logits_stay_float32():
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"], dtype=jnp.bfloat16)
    images = jnp.zeros((2, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32"), jnp.dtype("int32")}
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 16, 16, 7), jnp.float32)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (70, 94), (33, 129)])
@pytest.mark.parametrize("head", HEADS)
def test_any_size_of_32_and_more_works(head: str, height: int, width: int):
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head])
    images = jnp.zeros((2, height, width, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits = jax.eval_shape(model.apply, variables, images)
    assert logits.shape == (2, (height + 1) // 4, (width + 1) // 4, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "unet"}, "head is 'unet', expected one of upernet, fpn"),
        ({"num_classes": 0}, "num_classes is 0, expected at least 1"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0, expected 0 <= rate < 1"),
        ({"backbone": {**goldens.MICRO, "depths": (1, 2, 2, 2)}}, "stage 0 has 1 block"),
    ],
)
def test_fields_that_fit_no_model_are_named(fields: Any, message: str):
    with pytest.raises(ValueError, match=message):
        am.ActiveSegmentor(**{**goldens.SEG_MICRO["upernet"], **fields})


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no backbone 'resnet', expected one of active_base"):
        am.create_segmentor("resnet")
    with pytest.raises(ValueError, match="head is 'fcn', expected one of upernet, fpn"):
        am.create_segmentor("active_tiny", "fcn")


def test_batch_norm_needs_more_than_one_value_to_train():
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"])
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(ValueError, match="batch norm needs more than one value per channel"):
        jax.eval_shape(lambda v: model.apply(v, images, train=True), variables)


def test_resizing_and_pooling_are_pytorchs():
    from torch import from_numpy
    from torch.nn import functional

    x = goldens.normal(0, "map", (2, 5, 7, 3)).astype(np.float32)
    theirs = from_numpy(x).permute(0, 3, 1, 2)
    cases = [
        (lambda y: resize_bilinear(y, 13, 4), "bilinear", (13, 4)),
        (lambda y: resize_bilinear(y, 10, 14), "bilinear", (10, 14)),
        (lambda y: resize_nearest(y, 9, 13), "nearest", (9, 13)),
        (lambda y: pool_adaptive(y, 3), "pool", (3, 3)),
        (lambda y: pool_adaptive(y, 6), "pool", (6, 6)),
    ]
    for ours, mode, size in cases:
        if mode == "pool":
            expected = functional.adaptive_avg_pool2d(theirs, size)
        else:
            corners = {"align_corners": False} if mode == "bilinear" else {}
            expected = functional.interpolate(theirs, size, mode=mode, **corners)
        what = f"{mode} to {size}"
        goldens.assert_close(ours(x), expected.permute(0, 2, 3, 1).numpy(), 1e-6, what)
