"""All settings of a run with their defaults, and the check of a config."""

import json
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from activemlp_jax.data.batch_transforms import group_size
from activemlp_jax.data.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.tasks.registry import TASKS, make_task
from activemlp_jax.training.limits import check_values
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import short

# Keys that may change when a run is resumed. They do not change what it computes, apart from
# rounding and, for `accumulation`, the samples that drop path drops.
FREE_TO_CHANGE = (
    "tensorboard",
    "log_every_steps",
    "profile",
    "accumulation",
    "mesh.data",
    "mesh.fsdp",
    "model.remat_stages",
    "test.every_epochs",
    "data.num_threads",
    "data.num_workers",
    "data.on_error",
    "data.max_skipped",
    "checkpoint.keep",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
)


def default_config() -> ConfigDict:
    """Default settings, for a run on the digits; the config is locked: no keys can be added."""
    config = ConfigDict()
    config.task = "classification"  # or segmentation
    config.seed = 0
    config.epochs = 30
    config.steps = 0  # length of the run, instead of epochs; 0: use epochs
    config.batch_size = 128  # images per step, over all devices
    config.accumulation = 1  # parts of a batch to process one after the other, to save memory
    config.eval_batch_size = 128
    config.label_smoothing = 0.1
    config.ema_decay = 0.99996  # 0: keep no average
    config.ema_warmup = False  # smaller decay at first, for short runs; see step.update_average
    config.tensorboard = False
    config.log_every_steps = 50  # counted from the start of each epoch
    config.profile = 0  # steps to trace after the first ten of a process, into WORKDIR/profile
    # Model directory to start from. Its architecture replaces that of config.model. A segmentation
    # model may start from the backbone of a classifier.
    config.init_from = ""
    config.init_weights = "auto"  # the default of the model directory; or ema, or model

    config.model = ConfigDict()  # fields of ActiveMLP; num_classes comes from the dataset
    config.model.depths = (2, 2, 2, 2)
    config.model.embed_dims = (32, 64, 96, 128)
    config.model.mlp_ratios = (4.0, 4.0, 4.0, 4.0)
    config.model.share_dims = (2, 4, 4, 8)
    config.model.offset_interval = 2
    config.model.drop_path_rate = 0.0
    config.model.dtype = "float32"  # of the computation; or bfloat16, or float64
    config.model.remat_stages = ()  # stages whose blocks are recomputed in the backward pass

    config.head = ConfigDict()  # for segmentation: fields of ActiveSegmentor
    config.head.name = "upernet"  # or fpn
    config.head.channels = 0  # 0: the original's number
    config.head.aux_channels = 256
    config.head.neck_channels = 256
    config.head.dropout_rate = 0.1

    config.mesh = ConfigDict()  # devices along each axis; see sharding.make_mesh
    config.mesh.data = -1  # split the batch, replicate the state; -1: all devices that fsdp leaves
    config.mesh.fsdp = 1  # split the batch and the state

    config.data = ConfigDict()
    config.data.name = "digits"  # or folder:PATH, or tfds:NAME; see sources.open_source
    # For segmentation: digit_scenes, ade20k:PATH, folder:PATH; see segmentation_sources.open_scenes
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 32
    config.data.resize_factor = 256 / 224  # for evaluation; see preprocessing.Preprocessing
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.num_threads = 2  # threads that read and transform images, on each host
    config.data.num_workers = 0  # worker processes, instead of the threads
    config.data.on_error = "skip"  # replace a broken image by the next one; or "raise"
    config.data.max_skipped = 100  # stop after more broken images than this
    config.data.repeats = 1  # copies of each image: repeated augmentation; see sampler.SampleOrder

    # Or random_resized_crop, which uses crop, flip, randaugment and color_jitter.
    config.data.augmentation = "warp"
    config.data.crop = ConfigDict()  # see image_transforms.draw_crop
    config.data.crop.min_area = 0.08
    config.data.crop.max_area = 1.0
    config.data.crop.min_ratio = 3 / 4
    config.data.crop.max_ratio = 4 / 3
    config.data.flip = 0.5  # probability
    config.data.randaugment = ""  # such as rand-m9-mstd0.5-inc1; see randaugment
    config.data.color_jitter = 0.0  # used only without RandAugment
    config.data.scene = ConfigDict()  # for segmentation; see segmentation_transforms
    # In training and in tests, scenes are resized to fit into long_side x short_side pixels; with a
    # long_side of 0, they keep their size.
    config.data.scene.long_side = 0
    config.data.scene.short_side = 512
    config.data.scene.min_ratio = 0.5  # random scale of that size, in training
    config.data.scene.max_ratio = 2.0
    config.data.scene.max_class_share = 0.75  # largest share of one class in a crop
    config.data.scene.photometric = True
    config.data.warp = ConfigDict()  # for warp; see warp.random_warp
    config.data.warp.degrees = 0.0
    config.data.warp.scale = 0.0
    config.data.warp.shear = 0.0
    config.data.warp.translate = 0.0
    config.data.warp.bend = 0.0

    config.test = ConfigDict()
    config.test.every_epochs = 1
    config.test.size_multiple = 1  # round the sides of scenes to multiples; see tiling.Protocol

    config.random_erasing = 0.0  # probability for each image
    config.mix = ConfigDict()  # see batch_transforms.draw_mixing
    config.mix.mixup_alpha = 0.0  # 0: no mixup
    config.mix.cutmix_alpha = 0.0  # 0: no cutmix
    config.mix.cutmix_probability = 0.5  # of cutmix rather than mixup, if both are on
    config.mix.group_size = 128  # rows that share one mixing; a smaller batch is one group

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "steps"  # or epochs, or poly; see schedules.learning_rate_schedule
    config.optimizer.learning_rate = 5e-4  # peak, after the warm-up
    config.optimizer.reference_batch_size = 0  # images that learning_rate is for; 0: do not scale
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.warmup_steps = 1500  # for poly, instead of warmup_epochs
    config.optimizer.weight_decay = 0.05
    config.optimizer.not_decayed = "vectors"  # or norms; see optimizer.decay_mask
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.0  # global norm of the gradient; 0: do not clip
    config.optimizer.layer_decay = 1.0  # ratio of learning rates, a block to the next one

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # 0: do not save by steps
    config.checkpoint.every_minutes = 0.0  # since the last save; 0: do not save by the clock
    config.checkpoint.keep = 2  # number of newest checkpoints; the best one is kept as well
    return config.lock()


def set_variant(config: ConfigDict, variant: str) -> None:
    """Set the architecture in `config.model` to a published variant, one of `list_models()`."""
    if variant not in VARIANTS:
        raise UserError(f"no model {variant!r}, expected one of {', '.join(VARIANTS)}")
    for field, value in VARIANTS[variant].items():
        config.model[field] = tuple(map(float, value)) if field == "mlp_ratios" else value


def check_config(config: ConfigDict) -> None:
    """Raise UserError for invalid settings, naming the key, the value and what was expected."""
    if config.task not in TASKS:
        raise UserError(f"config.task is {config.task!r}, expected one of {', '.join(TASKS)}")
    check_values(config)
    for group, kind in (("crop", "area"), ("crop", "ratio"), ("scene", "ratio")):
        low, high = (config.data[group][f"{end}_{kind}"] for end in ("min", "max"))
        if low > high:
            raise UserError(
                f"config.data.{group}.min_{kind} is {low!r}, expected at most max_{kind}, {high!r}"
            )
    TASKS[config.task].check_config(config)
    mixed_rows = group_size(config)
    if config.batch_size % mixed_rows:
        raise UserError(
            f"config.batch_size is {config.batch_size}, expected a multiple of "
            f"config.mix.group_size, {mixed_rows}, or less than it"
        )
    if config.model.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise UserError("config.model.dtype is float64, which needs JAX_ENABLE_X64=1 to be set")
    if config.data.randaugment:
        try:
            parse_randaugment(config.data.randaugment)
        except ValueError as error:
            raise UserError(f"config.data.randaugment: {error}") from error
    make_task(config, num_classes=1)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Values of a config, keyed by names such as 'data.name'."""
    return flatten_dict(config.to_dict(), sep=".")


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Compare the settings of two runs in all keys but `FREE_TO_CHANGE`.

    Configs saved by earlier versions lack some keys; these count as their defaults.

    Args:
      ours: the config of this run, as a nested dict.
      theirs: the other config, likewise.

    Returns:
      The keys that differ, each in a string with both values.
    """
    defaults = flatten_dict(json.loads(default_config().to_json()), sep=".")
    here, there = (defaults | flatten_dict(saved, sep=".") for saved in (ours, theirs))
    return [
        f"{key} ({short(there.get(key, 'absent'))} there, {short(here.get(key, 'absent'))} here)"
        for key in sorted(here.keys() | there.keys())
        if here.get(key, "absent") != there.get(key, "absent") and key not in FREE_TO_CHANGE
    ]
