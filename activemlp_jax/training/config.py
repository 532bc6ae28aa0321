"""Every setting of a run, with its default; configs change what differs from these."""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

from activemlp_jax.data.batch_transforms import group_size
from activemlp_jax.data.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.tasks.registry import TASKS, make_task
from activemlp_jax.training.limits import check_values
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import short

# A run may be resumed with others of these. They do not change what it computes, but for rounding
# and, with accumulation, which samples drop path drops.
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
    """The settings of a run on the digits, locked: keys can be changed, not added."""
    config = ConfigDict()
    config.task = "classification"  # or segmentation
    config.seed = 0
    config.epochs = 30
    config.steps = 0  # length of the run in place of epochs; 0: by epochs
    config.batch_size = 128  # images a step, over all devices
    config.accumulation = 1  # parts a batch is taken in, one after the other, to save memory
    config.eval_batch_size = 128
    config.label_smoothing = 0.1
    config.ema_decay = 0.99996  # 0 keeps no average
    config.ema_warmup = False  # of the decay, for short runs; see step.make_train_step
    config.tensorboard = False
    config.log_every_steps = 50  # of an epoch
    config.profile = 0  # steps to trace, from the tenth of this process on, into WORKDIR/profile
    # A model directory to start from: its weights, and its architecture in place of config.model's.
    # Of a segmentation model, the backbone may come from a classifier's.
    config.init_from = ""
    config.init_weights = "auto"  # the directory's default; or ema, or model

    config.model = ConfigDict()  # the fields of ActiveMLP; num_classes is the data set's
    config.model.depths = (2, 2, 2, 2)
    config.model.embed_dims = (32, 64, 96, 128)
    config.model.mlp_ratios = (4.0, 4.0, 4.0, 4.0)
    config.model.share_dims = (2, 4, 4, 8)
    config.model.offset_interval = 2
    config.model.drop_path_rate = 0.0
    config.model.dtype = "float32"  # of the computation
    config.model.remat_stages = ()  # whose blocks are computed again in the backward pass

    config.head = ConfigDict()  # of a segmentation model: the fields of ActiveSegmentor
    config.head.name = "upernet"  # or fpn
    config.head.channels = 0  # 0: the original's
    config.head.aux_channels = 256
    config.head.neck_channels = 256
    config.head.dropout_rate = 0.1

    config.mesh = ConfigDict()  # devices; see sharding.make_mesh
    config.mesh.data = -1  # that split the batch and each have the whole state; -1: all the others
    config.mesh.fsdp = 1  # that split the batch and the state

    config.data = ConfigDict()
    config.data.name = "digits"  # or folder:PATH, or tfds:NAME; see sources.open_source
    # For segmentation digit_scenes, ade20k:PATH, folder:PATH; see scene_sources.open_scenes
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 32
    config.data.resize_factor = 256 / 224  # of evaluation; see preprocessing.Preprocessing
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.num_threads = 2  # that read and transform images, on each host
    config.data.num_workers = 0  # processes to do so in place of the threads
    config.data.on_error = "skip"  # a broken image: the next one in its place; or "raise"
    config.data.max_skipped = 100  # broken images, before a run stops all the same
    config.data.repeats = 1  # of each image in a row: repeated augmentation; see order.SampleOrder

    config.data.augmentation = "warp"  # or random_resized_crop, which the next five are for
    config.data.crop = ConfigDict()  # see transforms.draw_crop
    config.data.crop.min_area = 0.08
    config.data.crop.max_area = 1.0
    config.data.crop.min_ratio = 3 / 4
    config.data.crop.max_ratio = 4 / 3
    config.data.flip = 0.5  # probability
    config.data.randaugment = ""  # such as rand-m9-mstd0.5-inc1; see randaugment
    config.data.color_jitter = 0.0  # used where there is no RandAugment
    config.data.scene = ConfigDict()  # for segmentation; see scene_transforms
    config.data.scene.long_side = 0  # that scenes are fitted into, in training and in tests; 0:
    config.data.scene.short_side = 512  # they are left as they are
    config.data.scene.min_ratio = 0.5  # of that size, in training
    config.data.scene.max_ratio = 2.0
    config.data.scene.max_class_share = 0.75  # of one class in a crop of image_size
    config.data.scene.photometric = True
    config.data.warp = ConfigDict()  # see transforms.random_warp
    config.data.warp.degrees = 0.0
    config.data.warp.scale = 0.0
    config.data.warp.shear = 0.0
    config.data.warp.translate = 0.0
    config.data.warp.bend = 0.0

    config.test = ConfigDict()
    config.test.every_epochs = 1
    config.test.size_multiple = 1  # that sides of scenes are rounded to; see views.Protocol

    config.random_erasing = 0.0  # probability, for each image
    config.mix = ConfigDict()  # see device.draw_mixing
    config.mix.mixup_alpha = 0.0  # 0 for no mixup
    config.mix.cutmix_alpha = 0.0  # 0 for no cutmix
    config.mix.cutmix_probability = 0.5  # where there are both
    config.mix.group_size = 128  # rows mixed alike and among themselves; a smaller batch is one

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.schedule = "steps"  # epochs or poly; see schedules.learning_rate_schedule
    config.optimizer.learning_rate = 5e-4  # the highest, after the warm-up
    config.optimizer.reference_batch_size = 0  # that it is for, to be scaled; 0: as it stands
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.warmup_steps = 1500  # of poly, in place of epochs
    config.optimizer.weight_decay = 0.05
    config.optimizer.not_decayed = "vectors"  # or norms; see optimizer.decay_mask
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.0  # of the whole gradient; 0 does not clip
    config.optimizer.layer_decay = 1.0  # of the learning rate, from each block to the one before

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # of the run; 0: not by steps
    config.checkpoint.every_minutes = 0.0  # since the last; 0: not by the clock
    config.checkpoint.keep = 2  # the newest, and the best beside them
    return config.lock()


def check_config(config: ConfigDict) -> None:
    """Raises UserError, naming the key, the value and what was expected, before any work."""
    if config.task not in TASKS:
        raise UserError(f"config.task is {config.task!r}, expected one of {', '.join(TASKS)}")
    check_values(config)
    for place, kind in (("crop", "area"), ("crop", "ratio"), ("scene", "ratio")):
        low, high = (config.data[place][f"{end}_{kind}"] for end in ("min", "max"))
        if low > high:
            raise UserError(
                f"config.data.{place}.min_{kind} is {low!r}, expected at most max_{kind}, {high!r}"
            )
    TASKS[config.task].check_config(config)
    group = group_size(config)
    if config.batch_size % group:
        raise UserError(
            f"config.batch_size is {config.batch_size}, expected a multiple of "
            f"config.mix.group_size, {group}, or less than it"
        )
    if config.model.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise UserError("config.model.dtype is float64, which needs JAX_ENABLE_X64=1 to be set")
    if config.data.randaugment:
        try:
            parse_randaugment(config.data.randaugment)
        except ValueError as error:
            raise UserError(f"config.data.randaugment: {error}") from error
    make_task(config, num_classes=1)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested dict by their keys joined with dots, each behind `prefix`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys on which two runs' settings disagree in what the run computes, each with both values.

    A run of an earlier version lacks some keys, whose defaults are what it computed.
    """
    defaults = flatten(json.loads(default_config().to_json()))
    a, b = defaults | flatten(ours), defaults | flatten(theirs)
    return [
        f"{key} ({short(b.get(key, 'absent'))} there, {short(a.get(key, 'absent'))} here)"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent") and key not in FREE_TO_CHANGE
    ]
