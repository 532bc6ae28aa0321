"""Fine-tune a model of handwritten letters on the digits, in half the epochs.

    python examples/draw_letters.py data/letters
    python train.py --workdir runs/letters_first --config.epochs=20 \\
        --config.data.name=folder:data/letters --config.data.test_split=val
    python train.py --config configs/digits_fine_tune.py --config.init_from=runs/letters_first/model
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits_config


def get_config() -> ConfigDict:
    """Return the config for the digits with the settings for fine-tuning."""
    config = digits_config()
    config.epochs = 20
    config.optimizer.learning_rate = 1e-3
    return config
