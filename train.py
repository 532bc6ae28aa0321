"""Train ActiveMLP as a config file says; run the same command again to resume a stopped run.

Examples:
  python train.py
  python train.py --config configs/digits.py --workdir runs/seed-1 --config.seed=1
"""

from pathlib import Path

from activemlp_jax.training.cli_flags import run

if __name__ == "__main__":
    run(__doc__, default_path=Path(__file__).parent / "configs" / "digits.py")
