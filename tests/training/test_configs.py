"""Every config file can be read, has valid settings, and has those of the original's recipe."""

import re
from pathlib import Path
from typing import Any

import pytest

import activemlp_jax as am
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.tasks.registry import make_task
from activemlp_jax.training.cli_flags import config_name, load_config
from activemlp_jax.training.config import check_config, default_config, flatten
from activemlp_jax.utils.errors import UserError

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))

# Section 4 of the paper and the authors' release; 1,024 images are eight devices with 128.
RECIPE: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 1024,
    "label_smoothing": 0.1,
    "ema_decay": 0.99996,
    "ema_warmup": False,
    "augment.random_erasing": 0.25,
    "augment.mixup_alpha": 0.8,
    "augment.cutmix_alpha": 1.0,
    "augment.cutmix_probability": 0.5,
    "augment.mix_group_size": 128,
    "model.drop_path_rate": 0.1,
    "data.name": "tfds:imagenet2012",
    "data.train_split": "train",
    "data.test_split": "validation",
    "data.image_size": 224,
    "data.resize_factor": 256 / 224,
    "augment.repeats": 3,
    "augment.policy": "random_resized_crop",
    "augment.crop.min_area": 0.08,
    "augment.crop.max_area": 1.0,
    "augment.crop.min_ratio": 3 / 4,
    "augment.crop.max_ratio": 4 / 3,
    "augment.flip": 0.5,
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.color_jitter": 0.4,
    "optimizer.name": "adamw",
    "optimizer.schedule": "epochs",
    "optimizer.learning_rate": 5e-4,
    "optimizer.reference_batch_size": 512,
    "optimizer.warmup_learning_rate": 1e-6,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_epochs": 5,
    "optimizer.weight_decay": 0.05,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 0.0,
    "optimizer.layer_decay": 1.0,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_work_and_says_how_to_run_it(path: Path):
    config = load_config(str(path))
    check_config(config)
    documented = re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)
    assert documented
    assert f"python train.py --config configs/{path.name}" in documented[1]
    assert re.search(r"Measured|Not run by us|not tuned|half the\s+epochs", documented[1])


@pytest.mark.parametrize("batch_size", [100, 128, 256, 257])
def test_a_batch_is_whole_groups_only_where_it_is_mixed(batch_size: int):
    config = load_config(f"{FOLDER}/imagenet.py:active_tiny")
    config.batch_size = batch_size
    if batch_size == 257:
        with pytest.raises(UserError, match=r"257, expected a multiple of .*group_size, 128"):
            check_config(config)
    else:
        check_config(config)
    config.augment.mixup_alpha = config.augment.cutmix_alpha = 0.0
    check_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 2}, "accumulation is 2, expected 1 for segmentation"),
        ({"batch_size": 1}, "batch_size is 1, expected at least 2 for segmentation"),
        ({"augment.random_erasing": 0.1}, "random_erasing is 0.1, expected 0 for segmentation"),
        ({"augment.mixup_alpha": 0.1}, "config.augment.mixup_alpha is 0.1, expected 0 for segment"),
        ({"head.name": "unet"}, "config.head.name is 'unet', expected one of upernet, fpn"),
        (
            {"augment.scene.min_scale": 3.0},
            "min_scale is 3.0, expected at most max_scale, 2.0",
        ),
        ({"task": "detection"}, "task is 'detection', expected one of classification, segm"),
        ({"optimizer.not_decayed": "none"}, "not_decayed is 'none', expected one of vectors, nor"),
    ],
)
def test_what_segmentation_cannot_do_is_named(changes: dict[str, Any], message: str):
    config = load_config(f"{FOLDER}/ade20k_upernet.py:active_tiny")
    check_config(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


NUMBERS = [key for key, value in flatten(default_config()).items() if type(value) in (int, float)]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("value", [-7, 10**30], ids=["negative", "huge"])
def test_no_number_may_be_negative_or_huge_also_those_of_the_other_task(value: int, task: str):
    said = {}
    for key in NUMBERS:
        config = default_config()
        config.task = task
        config.update_from_flattened_dict({key: value})
        try:
            check_config(config)
        except UserError as error:
            said[key] = str(error)
    assert len(said) > 60
    assert [key for key in NUMBERS if f"{key.split('.')[-1]} is " not in said.get(key, "")] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.depths", (10**9, 2, 2, 2)),
        ("model.embed_dims", (64, 128, 10**9, 512)),
        ("model.mlp_ratios", (4.0, 1e30, 4.0, 4.0)),
        ("data.mean", (0.5, 1e30, 0.5)),
    ],
)
def test_no_number_of_several_may_be_huge(key: str, value: tuple[float, ...]):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"config\.{key} is .*, expected at most"):
        check_config(config)


# Settings of the original's ADE20K experiments; for Semantic FPN, it published only the steps.
ADE20K: dict[str, Any] = {
    "batch_size": 16,
    "ema_decay": 0.0,
    "init_weights": "model",
    "model.drop_path_rate": 0.2,
    "head.dropout_rate": 0.1,
    "data.image_size": 512,
    "data.scene.long_side": 2048,
    "data.scene.short_side": 512,
    "augment.scene.min_scale": 0.5,
    "augment.scene.max_scale": 2.0,
    "augment.scene.max_class_share": 0.75,
    "augment.scene.photometric": True,
    "augment.flip": 0.5,
    "optimizer.schedule": "poly",
    "optimizer.final_learning_rate": 0.0,
    "optimizer.reference_batch_size": 0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
}
UPERNET: dict[str, Any] = {
    "steps": 160_000,
    "optimizer.learning_rate": 6e-5,
    "optimizer.warmup_learning_rate": 6e-11,
    "optimizer.warmup_steps": 1500,
    "optimizer.weight_decay": 0.01,
    "optimizer.not_decayed": "norms",
}


@pytest.mark.parametrize("name", am.list_models())
@pytest.mark.parametrize("head", ["upernet", "fpn"])
def test_each_model_has_configs_with_the_originals_recipe_for_ade20k(name: str, head: str):
    config = load_config(f"{FOLDER}/ade20k_{head}.py:{name}")
    flat = flatten(config)
    expected = ADE20K | (UPERNET if head == "upernet" else {"steps": 40_000})
    assert {key: flat[key] for key in expected} == expected
    model = make_task(config, num_classes=150).model
    published = am.create_segmentor(name, head, drop_path_rate=0.2, dtype="bfloat16")
    assert model == published.clone(dtype=model.dtype)


@pytest.mark.parametrize("name", am.list_models())
def test_each_model_has_a_config_with_the_originals_recipe(name: str):
    config = load_config(f"{FOLDER}/{name}.py")
    flat = flatten(config)
    differing = {key: flat[key] for key, value in RECIPE.items() if flat[key] != value}
    assert not differing
    model = make_task(config, num_classes=1000).model
    for field, value in VARIANTS[name].items():
        assert getattr(model, field) == value
    assert config == load_config(f"{FOLDER}/imagenet.py:{name}")


@pytest.mark.parametrize("name", ["imagenet", "ade20k_upernet", "ade20k_fpn"])
def test_an_unknown_variant_is_named_with_the_known_ones(name: str):
    known = "active_xtiny, active_tiny, active_small, active_base, active_large"
    message = f"{name}.py:active_huge: no model 'active_huge', expected one of {known}$"
    with pytest.raises(UserError, match=message):
        load_config(f"{FOLDER}/{name}.py:active_huge")


def test_a_variant_is_part_of_the_name_of_a_config():
    assert config_name("configs/ade20k_fpn.py:active_tiny") == "ade20k_fpn_active_tiny"
    assert config_name("configs/ade20k_fpn.py") == "ade20k_fpn"
