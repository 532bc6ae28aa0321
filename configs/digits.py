"""A small ActiveMLP on scikit-learn's handwritten digits: the first run on any machine."""

from ml_collections import ConfigDict

from activemlp_jax.training.config import default_config


def get_config() -> ConfigDict:
    """The defaults, and what the digits change."""
    config = default_config()
    config.epochs = 40
    config.batch_size = 96
    config.eval_batch_size = 120
    config.ema_decay = 0.99
    config.label_smoothing = 0.05
    config.optimizer.learning_rate = 2e-3
    config.data.affine.degrees = 15.0
    config.data.affine.scale = 0.15
    config.data.affine.shear = 0.15
    config.data.affine.translate = 0.1
    return config
