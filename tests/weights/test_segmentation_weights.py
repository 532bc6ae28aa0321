"""Segmentation weights of PyTorch: names in both directions, files, and the PyTorch reference."""

import functools
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import activemlp_jax as am
from activemlp_jax.models.segmentor import backbone
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.model_types import HEAD
from activemlp_jax.weights.torch_files import read_checkpoint, write_checkpoint
from activemlp_jax.weights.torch_names import infer_model
from activemlp_jax.weights.verify import torch_model

HEADS = {"upernet": 13, "fpn": 7}  # heads and their number of batch norms
MICRO_CHECKPOINT = goldens.DATA / "seg_micro_upernet_checkpoint.pth"
COUNT = "decode_head.bottleneck.bn.num_batches_tracked"


def official_shapes(head: str) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of the original's active_large with this head."""
    shapes = goldens.load_json(f"official_seg_keys_ActiveLarge_{head}.json")
    return {key: tuple(shape) for key, shape in shapes.items()}


def micro(head: str) -> am.ActiveSegmentor:
    return am.ActiveSegmentor(**goldens.SEG_MICRO[head])


@functools.cache
def micro_shapes(head: str) -> dict[str, tuple[int, ...]]:
    return goldens.torch_shapes(micro(head))


def micro_weights(head: str = "upernet") -> dict[str, torch.Tensor]:
    """Return micro weights with the dtypes of a file: float32, and int64 for counts."""
    arrays = goldens.rule_state_dict(micro_shapes(head))
    return {
        key: torch.tensor(value, dtype=torch.float32 if value.dtype.kind == "f" else torch.int64)
        for key, value in arrays.items()
    }


# --- names and layouts


@pytest.mark.parametrize("head", HEADS)
def test_the_originals_keys_convert_both_ways_bit_for_bit(head: str):
    rng = np.random.default_rng(0)
    state_dict = {
        key: np.asarray(rng.integers(2**31)) if key.endswith("tracked") else rng.random(shape, "f")
        for key, shape in official_shapes(head).items()
    }
    variables = am.from_torch(state_dict, am.create_segmentor("active_large", head))
    assert set(variables) == {"params", "batch_stats"}
    back = am.to_torch(variables)
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape), key
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    counts = [value for key, value in back.items() if key.endswith("num_batches_tracked")]
    assert [(count.dtype, count.shape) for count in counts] == [(np.int64, ())] * HEADS[head]


@pytest.mark.parametrize("head", HEADS)
def test_the_model_is_read_off_the_shapes(head: str):
    shapes = official_shapes(head)
    state_dict = {key: np.broadcast_to(np.zeros(()), shape) for key, shape in shapes.items()}
    for found, expected in (
        (infer_model(state_dict), am.create_segmentor("active_large", head)),
        (infer_model(micro_weights(head)), micro(head)),
    ):
        assert isinstance(found, am.ActiveSegmentor)
        assert backbone(found) == backbone(expected)
        for field in ("num_classes", *HEAD):
            assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ("upernet", {COUNT: None}, rf"keys 1 missing \({COUNT}\)$"),
        ("fpn", {"decode_head.scale_heads.3.4.bn.running_var": None}, r"3\.4\.bn\.running_var\)$"),
        ("fpn", {"neck.fpn_convs.2.conv.bias": None}, r"missing \(neck\.fpn_convs\.2\.conv\.bias"),
        ("upernet", {"backbone.norm_3.weight": None}, r"1 missing \(backbone\.norm_3\.weight\)$"),
        ("upernet", {"backbone.norm.weight": np.zeros(32)}, r"1 unknown \(backbone\.norm\.weight"),
        ("upernet", {"decode_head.conv_seg.weight": None}, r"misses decode_head\.conv_seg\.weight"),
        ("fpn", {"neck.lateral_convs.0.conv.weight": None}, r"misses neck\.lateral_convs\.0\.conv"),
        ("upernet", {"auxiliary_head.convs.0.conv.weight": None}, r"misses auxiliary_head\.convs"),
        (
            "upernet",
            {"backbone.blocks.0.0.norm1.weight": None},
            r"misses backbone\.blocks\.0\.0\.norm1\.weight",
        ),
        (
            "upernet",
            {"decode_head.bottleneck.conv.weight": np.zeros((12, 96, 3, 3))},
            r"bottleneck\.bn\.\w+ has shape \(16,\), the model expects \(12,\)",
        ),
        (
            "upernet",
            {"auxiliary_head.conv_seg.bias": np.zeros(19)},
            r"auxiliary_head\.conv_seg\.bias has shape \(19,\), the model expects \(7,\)",
        ),
        ("upernet", {COUNT: np.zeros(1, np.int64)}, r"tracked has shape \(1,\).* expects \(\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(head: str, changes: Any, message: str):
    state_dict = {**micro_weights(head), **changes}
    state_dict = {key: value for key, value in state_dict.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        am.from_torch(state_dict)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"the weights are of .* under upernet .* under fpn "):
        am.from_torch(micro_weights("upernet"), micro("fpn"))
    with pytest.raises(ValueError, match=r"the weights are of .* under upernet .*, expected an "):
        am.from_torch(micro_weights("upernet"), am.ActiveMLP(**goldens.MICRO))


# --- files


def test_the_originals_checkpoint_has_the_weights_of_the_golden_runs_bit_for_bit():
    """The tests of the model check that these weights give the original's logits."""
    ours = am.load_torch_checkpoint(MICRO_CHECKPOINT)
    jax.tree.map(np.testing.assert_array_equal, ours, goldens.rule_variables(micro("upernet")))


def test_a_checkpoint_of_mmsegmentation_says_its_classes_and_iteration():
    checkpoint = read_checkpoint(MICRO_CHECKPOINT)
    assert list(checkpoint.weights) == ["model"]
    assert checkpoint.class_names == tuple("abcdefg")
    assert (checkpoint.iteration, checkpoint.epoch, checkpoint.image_size) == (160000, None, None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights},
        lambda weights: {"meta": None, "state_dict": weights, "optimizer": {"state": {}}},
        lambda weights: {"meta": {"CLASSES": [1, 2], "iter": "7"}, "state_dict": weights},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["bare", "state_dict", "without meta", "odd meta", "data-parallel"],
)
def test_every_form_of_a_state_dict_is_understood(wrap: Any, tmp_path: Path):
    weights = micro_weights("fpn")
    torch.save(wrap(weights), tmp_path / "fpn.pth")
    checkpoint = read_checkpoint(tmp_path / "fpn.pth")
    assert (checkpoint.class_names, checkpoint.iteration) == (None, None)
    found = checkpoint.weights["model"]
    assert set(found) == set(weights)
    for key, value in weights.items():
        assert found[key].dtype == value.numpy().dtype
        np.testing.assert_array_equal(found[key], value.numpy(), err_msg=key)


def test_pytorch_reads_what_is_written_in_the_form_of_mmsegmentation(tmp_path: Path):
    weights, names = micro_weights(), ("wall", "building")
    arrays = {key: value.numpy() for key, value in weights.items()}
    write_checkpoint(tmp_path / "named.pth", {"model": arrays}, {}, names)
    write_checkpoint(tmp_path / "plain.pth", {"model": arrays}, {})
    content = torch.load(tmp_path / "named.pth", weights_only=True)
    assert set(content) == {"meta", "state_dict", "activemlp_jax"}
    assert content["meta"] == {"CLASSES": names}
    assert torch.load(tmp_path / "plain.pth", weights_only=True)["meta"] == {}
    for key, value in weights.items():
        found = content["state_dict"][key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), key
        assert torch.equal(found, value), key


INTEGER = torch.zeros(16, dtype=torch.int64)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decode_head.bottleneck.bn.running_var", INTEGER, "values of type int64, expected float"),
        ("backbone.num_batches_tracked_too", INTEGER, "has values of type int64, expected float"),
        (COUNT, INTEGER, r"has type int64 and shape \(16,\), expected one count of type int64"),
        (COUNT, torch.tensor(3.0), r"has type float32 and shape \(\), expected one count of type"),
        (COUNT, torch.tensor(3, dtype=torch.int32), r"has type int32 and shape \(\), expected one"),
        (COUNT, torch.tensor(-1), "is -1, expected a count between 0 and 2147483647"),
        (COUNT, torch.tensor(2**31), "is 2147483648, expected a count between 0 and 2147483647"),
        ("decode_head.bottleneck.bn.running_mean", torch.full((16,), torch.nan), "16 of 16 values"),
    ],
)
def test_a_value_that_no_weight_has_is_named(suffix: str, key: str, value: Any, message: str,
                                             tmp_path: Path):  # fmt: skip
    path, weights = tmp_path / f"odd{suffix}", {**micro_weights(), key: value}
    if suffix == ".pth":
        torch.save({"meta": {}, "state_dict": weights}, path)
    else:
        save_file({name: tensor.numpy() for name, tensor in weights.items()}, path)
    with pytest.raises(UserError, match=rf"odd\{suffix}: model: {key} .*{message}") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


# --- the PyTorch reference


def pytorch_logits(head: str, state_dict: dict[str, np.ndarray], images: np.ndarray) -> Any:
    model = torch_model(micro(head)).double()
    model.load_state_dict({key: torch.tensor(value) for key, value in state_dict.items()})
    with torch.inference_mode():
        return [logits.numpy() for logits in model(torch.tensor(images))]


@pytest.mark.parametrize("head", HEADS)
def test_the_second_writing_has_the_keys_and_shapes_of_the_original(head: str):
    with torch.device("meta"):
        model = torch_model(am.create_segmentor("active_large", head))
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == official_shapes(head)
    assert not model.training


@pytest.mark.parametrize("head", HEADS)
def test_the_second_writing_computes_what_the_original_does(head: str):
    golden = goldens.load(f"seg_micro_{head}.npz")
    images = goldens.golden_input(f"seg_micro_{head}.npz", "input")
    state_dict = goldens.rule_state_dict(micro_shapes(head))
    found = pytorch_logits(head, state_dict, images)
    names = ["logits", "aux_logits"][: len(found)]
    assert (len(found) == 2) == ("aux_logits" in golden)
    for name, logits in zip(names, found, strict=True):
        goldens.assert_close(logits, golden[name], 1e-9, name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("head", HEADS)
def test_flax_and_pytorch_agree_where_no_side_is_twice_another(head: str):
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head], dtype=jnp.float64)
    images = goldens.normal(7, "images", (1, 70, 94, 3))
    state_dict = goldens.rule_state_dict(micro_shapes(head), 7)
    theirs = pytorch_logits(head, state_dict, images)
    options = {"return_aux": True} if head == "upernet" else {}
    apply = jax.jit(lambda variables, x: model.apply(variables, x, **options))
    ours = jax.tree.leaves(apply(am.from_torch(state_dict, model), images))
    for mine, other in zip(ours, theirs, strict=True):
        goldens.assert_close(mine, other, 1e-9, f"{head} at 70x94")
