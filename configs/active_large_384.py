"""active_large at 384 x 384, fine-tuned from its weights at 224.

    python train.py --config configs/active_large_384.py --config.init_from=runs/active_large/model

Or from the authors' weights, once converted: --config.init_from=models/active_large. Needs
imagenet2012 as ArrayRecord files (docs/data.md), and hardware for 512 images of 384 x 384 a step.

Not run by us. The original reports 84.8% top-1 at 384, but not how it was fine-tuned. These
settings follow its peers (Swin Transformer's fine-tuning from 224 to 384): 30 epochs, a peak of
2e-5 for 512 images with 5 epochs of warm-up from 2e-8, down to 2e-7, weight decay 1e-8. The rest
stays as at 224; the average of the weights forgets faster, as the run is a tenth as long.
"""

from ml_collections import ConfigDict

from activemlp_jax.training.recipe import imagenet_config


def get_config() -> ConfigDict:
    """The recipe at 224, and what fine-tuning at 384 changes."""
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
