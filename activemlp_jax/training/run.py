"""Prepare a run: check its config, make the mesh, open the data and build the trainer."""

from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.base import Source, check_same_classes
from activemlp_jax.distributed import hosts, sharding
from activemlp_jax.tasks.registry import TASKS, open_data
from activemlp_jax.training.config import check_config
from activemlp_jax.training.consistency import run_facts
from activemlp_jax.training.init_from import adopt_architecture
from activemlp_jax.training.trainer import Trainer, build_trainer
from activemlp_jax.training.workdir import read_mark, write_mark


class Run(NamedTuple):
    """Everything about a run that stays fixed while it trains."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    train_source: Source
    test_source: Source
    trainer: Trainer
    config_name: str  # '' if the config has no name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.train_source.class_names

    @property
    def last_step(self) -> int:
        """Number of steps of the whole run."""
        return self.trainer.steps


def prepare_run(config: ConfigDict, workdir: Path, config_name: str = "") -> Run:
    """Open the data, build the trainer, and check that all hosts agree on the run.

    Args:
      config: the whole config, with the keys of `default_config`.
      workdir: directory of the run, not accessed here.
      config_name: name of the config to record in model directories, such as 'digits'; '' for none.

    Raises:
      UserError: invalid settings, unusable data, or hosts that differ.
    """
    config = adopt_architecture(config)
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train_source = open_data(config, config.data.train_split)
    test_source = open_data(config, config.data.test_split)
    names = train_source.class_names
    check_same_classes(names, test_source.class_names, f"the test set of {config.data.name}")
    TASKS[config.task].check_packages(config)  # now, not at the first image
    trainer = build_trainer(config, len(names), len(train_source), mesh)
    hosts.check_same("the run", run_facts(config, (train_source, test_source)))
    return Run(config, workdir, mesh, train_source, test_source, trainer, config_name)


def check_shared(workdir: Path) -> None:
    """Raise UserError unless `workdir` is the same directory on all hosts."""
    if jax.process_count() == 1:
        return
    if hosts.is_first():
        write_mark(workdir)
    hosts.check_same("the workdir", {})  # a barrier: wait until the mark is written
    name = f"the mark in {workdir}, which must be a directory that all hosts share,"
    hosts.check_same("the mark", {name: read_mark(workdir)})
