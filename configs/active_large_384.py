"""Fine-tune active_large at 384 x 384 pixels from its weights at 224 x 224.

    python train.py --config configs/active_large_384.py --config.init_from=runs/active_large/model

To start from the authors' weights, convert them and pass --config.init_from=models/active_large.
Needs imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 512 images of 384 x 384
pixels per step.

Not run by us. The authors report 84.8% top-1 at 384, but not how they fine-tuned. These settings
follow Swin Transformer's fine-tuning from 224 to 384: 30 epochs, a peak learning rate of 2e-5 for
512 images, 5 epochs of warm-up from 2e-8, a final learning rate of 2e-7, and a weight decay of
1e-8. Other settings are as at 224, except that the weight average decays faster, because the run is
a tenth as long.
"""

from ml_collections import ConfigDict

from configs.imagenet import get_config as imagenet_config


def get_config() -> ConfigDict:
    """Return the recipe at 224 with the settings for fine-tuning at 384."""
    config = imagenet_config("active_large")
    config.epochs = 30
    config.batch_size = 512
    config.eval_batch_size = 256
    config.ema_decay = 0.9999
    config.data.image_size = 384
    config.optimizer.schedule = "steps"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_learning_rate = 2e-8
    config.optimizer.final_learning_rate = 2e-7
    config.optimizer.weight_decay = 1e-8
    return config
