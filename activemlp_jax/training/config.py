"""All settings of a run: their defaults, their allowed values, and their former names."""

import json
from collections.abc import Iterable
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from activemlp_jax.command_line import ABOVE_0, BELOW_1, check_range
from activemlp_jax.data.batch_transforms import group_size
from activemlp_jax.data.image_transforms import POLICIES
from activemlp_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE, VARIANTS
from activemlp_jax.models.segmentor import HEADS
from activemlp_jax.tasks.registry import TASKS, make_task
from activemlp_jax.training.optimizer import NOT_DECAYED, OPTIMIZERS
from activemlp_jax.training.schedules import SCHEDULES
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import short

# Keys that may change when a run is resumed. They do not change what the run computes, apart from
# rounding. `accumulation` also changes which samples drop path drops.
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
    """Return the default config, which trains on digits; it is locked: no keys can be added."""
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
    config.mesh.data = -1  # devices that split the batch and replicate the state; -1: all / fsdp
    config.mesh.fsdp = 1  # devices that split both the batch and the state

    config.data = ConfigDict()
    config.data.name = "digits"  # or folder:PATH, or tfds:NAME; see sources.open_source
    # For segmentation: digit_scenes, ade20k:PATH, folder:PATH; see sources.open_scenes
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 32
    config.data.resize_factor = 256 / 224  # for evaluation; see preprocessing.Preprocessing
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.num_threads = 2  # threads that read and transform images, on each host
    config.data.num_workers = 0  # worker processes to use instead of threads; 0: threads
    config.data.on_error = "skip"  # replace a broken image by the next one; or "raise"
    config.data.max_skipped = 100  # stop after more broken images than this
    # Segmentation images are resized to fit into long_side x short_side pixels, in training and in
    # tests; with a long_side of 0, they keep their size.
    config.data.scene = ConfigDict()
    config.data.scene.long_side = 0
    config.data.scene.short_side = 512

    config.augment = ConfigDict()
    config.augment.repeats = 1  # copies of each image (repeated augmentation); see SampleOrder
    config.augment.policy = "warp"  # or random_resized_crop; see image_transforms
    config.augment.crop = ConfigDict()  # for random_resized_crop; see image_transforms.draw_crop
    config.augment.crop.min_area = 0.08
    config.augment.crop.max_area = 1.0
    config.augment.crop.min_ratio = 3 / 4
    config.augment.crop.max_ratio = 4 / 3
    config.augment.flip = 0.5  # probability; for random_resized_crop and for segmentation
    config.augment.rand_augment = ""  # for random_resized_crop, such as rand-m9-mstd0.5-inc1
    config.augment.color_jitter = 0.0  # for random_resized_crop without RandAugment
    config.augment.warp = ConfigDict()  # for warp; see warp.random_warp
    config.augment.warp.degrees = 0.0
    config.augment.warp.scale = 0.0
    config.augment.warp.shear = 0.0
    config.augment.warp.translate = 0.0
    config.augment.warp.bend = 0.0
    config.augment.random_erasing = 0.0  # probability for each image
    config.augment.mixup_alpha = 0.0  # 0: no mixup; see batch_transforms.draw_mixing
    config.augment.cutmix_alpha = 0.0  # 0: no cutmix
    config.augment.cutmix_probability = 0.5  # of cutmix rather than mixup, if both are on
    # Number of images that share one mixup or cutmix draw; a smaller batch shares one as a whole.
    config.augment.mix_group_size = 128
    config.augment.scene = ConfigDict()  # for segmentation; see segmentation_transforms
    config.augment.scene.min_scale = 0.5  # random scale of the resized image, if data.scene resizes
    config.augment.scene.max_scale = 2.0
    config.augment.scene.max_class_share = 0.75  # largest share of one class in a crop
    config.augment.scene.photometric = True

    config.test = ConfigDict()
    config.test.every_epochs = 1
    config.test.size_multiple = 1  # round the sides of scenes to multiples; see tiling.Protocol

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "steps"  # or epochs, or poly; see schedules.learning_rate_schedule
    config.optimizer.learning_rate = 5e-4  # peak, after the warm-up
    config.optimizer.reference_batch_size = 0  # batch size for learning_rate; 0: do not scale it
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
    config.optimizer.layer_decay = 1.0  # a block's learning rate divided by that of the next block

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


CHOICES: dict[str, Iterable[str]] = {
    "task": TASKS,
    "init_weights": ("auto", "ema", "model"),
    "model.dtype": ("bfloat16", "float32", "float64"),
    "head.name": HEADS,
    "data.on_error": ("skip", "raise"),
    "augment.policy": POLICIES,
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "optimizer.not_decayed": NOT_DECAYED,
}

# Lowest and highest value of each setting, or of each number in a tuple. Numbers that are not
# listed here must be from 0 to `MOST`, which is far above what any run needs.
MOST = 10**7
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # JAX's random keys use 32 bits of it
    "epochs": (1, MOST),
    "batch_size": (1, 10**6),
    "accumulation": (1, 10**6),
    "eval_batch_size": (1, 10**6),
    "label_smoothing": (0, BELOW_1),
    "ema_decay": (0, BELOW_1),
    "log_every_steps": (1, MOST),
    "model.depths": (1, 1000),
    "model.embed_dims": (1, 2**16),
    "model.mlp_ratios": (0, 100),
    "model.share_dims": (1, 2**16),
    "model.offset_interval": (1, 1000),
    "head.channels": (0, 2**16),
    "head.aux_channels": (1, 2**16),
    "head.neck_channels": (1, 2**16),
    "head.dropout_rate": (0, BELOW_1),
    "mesh.data": (-1, 10**6),
    "mesh.fsdp": (1, 10**6),
    "data.image_size": (MIN_IMAGE_SIDE, 2**12),
    "data.resize_factor": (1, 4),
    "data.mean": (-1000, 1000),
    "data.std": (-1000, 1000),
    "data.num_threads": (0, 1000),
    "data.num_workers": (0, 1000),
    "data.scene.long_side": (0, 2**14),
    "data.scene.short_side": (1, 2**14),
    "augment.repeats": (1, 1000),
    "augment.crop.min_area": (ABOVE_0, 1),
    "augment.crop.max_area": (ABOVE_0, 1),
    "augment.crop.min_ratio": (ABOVE_0, 100),
    "augment.crop.max_ratio": (ABOVE_0, 100),
    "augment.flip": (0, 1),
    "augment.color_jitter": (0, 10),
    "augment.warp.degrees": (0, 360),
    "augment.warp.scale": (0, BELOW_1),
    "augment.warp.shear": (0, 10),
    "augment.warp.translate": (0, 10),
    "augment.warp.bend": (0, 10),
    "augment.random_erasing": (0, 1),
    "augment.mixup_alpha": (0, 1000),
    "augment.cutmix_alpha": (0, 1000),
    "augment.cutmix_probability": (0, 1),
    "augment.mix_group_size": (1, 10**6),
    "augment.scene.min_scale": (ABOVE_0, 100),
    "augment.scene.max_scale": (ABOVE_0, 100),
    "augment.scene.max_class_share": (ABOVE_0, 1),
    "test.every_epochs": (1, MOST),
    "test.size_multiple": (1, 2**12),
    # High enough for any experiment: a run that diverges stops when a metric is not finite.
    "optimizer.learning_rate": (ABOVE_0, 10**20),
    "optimizer.reference_batch_size": (0, 10**6),
    "optimizer.warmup_learning_rate": (0, 10**20),
    "optimizer.final_learning_rate": (0, 10**20),
    "optimizer.weight_decay": (0, 1000),
    "optimizer.b1": (0, BELOW_1),
    "optimizer.b2": (0, BELOW_1),
    "optimizer.eps": (0, 1),
    "optimizer.layer_decay": (ABOVE_0, 1),
    "checkpoint.every_epochs": (1, MOST),
    "checkpoint.keep": (1, MOST),
}


def check_config(config: ConfigDict) -> None:
    """Raise UserError for invalid settings, naming the key, the value and what was expected."""
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(
                f"config.{key} is {values[key]!r}, expected one of {', '.join(choices)}"
            )
    for key, value in values.items():
        check_range(f"config.{key}", value, *LIMITS.get(key, (0, MOST)))
    if config.mesh.data == 0:
        raise UserError("config.mesh.data is 0, expected -1 or at least 1")
    for key in ("data.train_split", "data.test_split"):
        if not values[key]:
            raise UserError(f"config.{key} is '', expected the name of a split")
    for group, kind in (("crop", "area"), ("crop", "ratio"), ("scene", "scale")):
        low, high = (config.augment[group][f"{end}_{kind}"] for end in ("min", "max"))
        if low > high:
            raise UserError(
                f"config.augment.{group}.min_{kind} is {low!r}, expected at most max_{kind}, "
                f"{high!r}"
            )
    TASKS[config.task].check_config(config)
    mixed_rows = group_size(config)
    if config.batch_size % mixed_rows:
        raise UserError(
            f"config.batch_size is {config.batch_size}, expected a multiple of "
            f"config.augment.mix_group_size, {mixed_rows}, or less than it"
        )
    if config.model.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise UserError("config.model.dtype is float64, which needs JAX_ENABLE_X64=1 to be set")
    if config.augment.rand_augment:
        try:
            parse_randaugment(config.augment.rand_augment)
        except ValueError as error:
            raise UserError(f"config.augment.rand_augment: {error}") from error
    make_task(config, num_classes=1)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Flatten a config to a dict keyed by names such as 'data.name'."""
    return flatten_dict(config.to_dict(), sep=".")


# Current names of keys and of groups of keys, by their names in configs from earlier versions.
RENAMED = {
    "data.augmentation": "augment.policy",
    "data.repeats": "augment.repeats",
    "data.crop": "augment.crop",
    "data.flip": "augment.flip",
    "data.randaugment": "augment.rand_augment",
    "data.color_jitter": "augment.color_jitter",
    "data.warp": "augment.warp",
    "data.scene.min_ratio": "augment.scene.min_scale",
    "data.scene.max_ratio": "augment.scene.max_scale",
    "data.scene.max_class_share": "augment.scene.max_class_share",
    "data.scene.photometric": "augment.scene.photometric",
    "random_erasing": "augment.random_erasing",
    "mix.mixup_alpha": "augment.mixup_alpha",
    "mix.cutmix_alpha": "augment.cutmix_alpha",
    "mix.cutmix_probability": "augment.cutmix_probability",
    "mix.group_size": "augment.mix_group_size",
}


def current_name(key: str) -> str:
    """Return the current name of a key, which earlier versions may have named differently."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def differing_keys(config: ConfigDict, theirs: dict[str, Any]) -> list[str]:
    """List the settings that differ between `config` and a saved config `theirs`, with both values.

    Keys in `FREE_TO_CHANGE` are left out. If earlier versions saved `theirs`, old names of keys are
    replaced by the current ones, and missing keys have their defaults.
    """
    defaults, here = (
        flatten_dict(json.loads(each.to_json()), sep=".") for each in (default_config(), config)
    )
    saved = flatten_dict(theirs, sep=".")
    there = defaults | {current_name(key): value for key, value in saved.items()}
    return [
        f"{key} ({short(there.get(key, 'absent'))} there, {short(here.get(key, 'absent'))} here)"
        for key in sorted(here.keys() | there.keys())
        if here.get(key, "absent") != there.get(key, "absent") and key not in FREE_TO_CHANGE
    ]
