"""The settings, code, devices and data that all hosts of a run must agree on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import activemlp_jax
from activemlp_jax.data.base import Source
from activemlp_jax.training.config import flatten


def code_version() -> str:
    """Compute a digest of this package's source files."""
    digest = hashlib.sha256()
    folder = Path(activemlp_jax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_facts(config: ConfigDict, sources: Sequence[Source]) -> dict[str, Any]:
    """Collect the facts that must match on every host, keyed by their names in messages."""
    settings = {f"config.{key}": value for key, value in flatten(config).items()}
    return {
        **settings,
        "the version of JAX": jax.__version__,
        "the code of activemlp_jax": code_version(),
        "the number of devices": jax.local_device_count(),
        "the kind of device": jax.local_devices()[0].device_kind,
        "the number of images": [len(source) for source in sources],
        "the digest of the class names": [
            hashlib.sha256("\n".join(source.class_names).encode()).hexdigest()[:16]
            for source in sources
        ],
    }
