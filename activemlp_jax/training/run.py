"""What a run is made of, opened and checked: config, mesh, data, trainer."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.base import Source, check_same_classes
from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.registry import TASKS, open_data
from activemlp_jax.training.config import check_config
from activemlp_jax.training.consistency import run_facts
from activemlp_jax.training.init_from import adopt_architecture
from activemlp_jax.training.trainer import Trainer, build_trainer
from activemlp_jax.training.workdir import read_mark, write_mark


class Run(NamedTuple):
    """What does not change from the first step of a run to its last."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    train_source: Source
    test_source: Source
    trainer: Trainer
    config_name: str  # '' where the config is of no file

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.train_source.class_names

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return self.trainer.steps


def prepare_run(config: ConfigDict, workdir: Path, timeout: float, config_name: str = "") -> Run:
    """Open the data and build the trainer; the same on all hosts, which is checked.

    Args:
      config: of `default_config`'s form.
      workdir: of the run; it is not touched.
      timeout: seconds to wait for the other hosts.
      config_name: what model directories call the config, such as 'digits'; '' for nothing.

    Raises:
      UserError: settings or data that cannot work, or hosts that differ.
    """
    config = adopt_architecture(config)
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train_source = open_data(config, config.data.train_split)
    test_source = open_data(config, config.data.test_split)
    names = train_source.class_names
    check_same_classes(names, test_source.class_names, f"the test set of {config.data.name}")
    TASKS[config.task].check_packages(config)  # better missed now than at the first image
    trainer = build_trainer(config, len(names), len(train_source), mesh)
    sharding.check_same("the run", run_facts(config, (train_source, test_source)), timeout)
    return Run(config, workdir, mesh, train_source, test_source, trainer, config_name)


def check_shared(workdir: Path, timeout: float) -> None:
    """Raises UserError if `workdir` is not one and the same directory for all hosts."""
    if sharding.this_host()["processes"] == 1:
        return
    if sharding.is_first_host():
        write_mark(workdir)
    sharding.check_same("the workdir", {}, timeout)  # waits until the mark is there
    name = f"the mark in {workdir}, which must be a directory that all hosts share,"
    sharding.check_same("the mark", {name: read_mark(workdir)}, timeout)
