"""The optimizer, the averaged weights and the step, compared with the original's training."""

from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_task import ToyTask

import activemlp_jax as am
from activemlp_jax.distributed.sharding import make_mesh
from activemlp_jax.tasks.classification import soft_cross_entropy
from activemlp_jax.training.config import default_config
from activemlp_jax.training.optimizer import decay_mask, make_optimizer
from activemlp_jax.training.step import TrainState, global_norm, make_train_step


def make_step(loss: Any, optimizer: Any, inputs: Any = None, **changes: Any) -> Any:
    """Make a step that keeps no average, with `changes` to the config."""
    config = default_config()
    config.update({"ema_decay": 0.0, **changes})
    task = ToyTask(loss, inputs) if inputs else ToyTask(loss)
    return make_train_step(task, optimizer, optax.constant_schedule(0.1), config, make_mesh())


def micro(**changes: Any) -> am.ActiveMLP:
    return am.ActiveMLP(**{**goldens.MICRO, **changes})


@pytest.mark.parametrize(
    ("model", "not_decayed", "file"),
    [
        (micro(), "vectors", "weight_decay_groups.json"),
        (
            am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"]),
            "norms",
            "seg_weight_decay_groups.json",
        ),
    ],
    ids=["classification", "segmentation"],
)
def test_the_original_groups_of_decayed_weights(model: Any, not_decayed: str, file: str):
    params = goldens.rule_variables(model)["params"]
    mask = decay_mask(params, not_decayed)
    spread = jax.tree.map(lambda decays, leaf: np.full(leaf.shape, decays), mask, params)
    by_name = {name: bool(value.all()) for name, value in am.to_torch({"params": spread}).items()}
    groups = goldens.load_json(file)
    assert {name for name, decays in by_name.items() if not decays} == set(
        groups["no_weight_decay"]
    )
    assert {name for name, decays in by_name.items() if decays} == set(groups["weight_decay"])


@pytest.mark.usefixtures("float64")
def test_six_steps_equal_the_originals():
    golden = goldens.load("train_steps.npz")
    model = micro(dtype=jnp.float64)

    def loss(variables: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        logits = model.apply(variables, batch["image"], train=True, rngs={"dropout": key})
        return soft_cross_entropy(logits, batch["target"]), {}

    rates = jnp.asarray(golden["lr"])
    optimizer = make_optimizer(default_config().optimizer, lambda step: rates[step], model)
    ema_decay = float(golden["ema_decay"])
    state = TrainState.create(goldens.rule_variables(model, seed=1), optimizer, ema_decay)
    step = jax.jit(make_step(loss, optimizer, ema_decay=ema_decay))
    for i, expected in enumerate(golden["loss"]):
        logits = goldens.golden_input("train_steps.npz", f"target_logits_{i}")
        batch = {
            "image": goldens.golden_input("train_steps.npz", f"image_{i}"),
            "target": np.exp(logits) / np.exp(logits).sum(-1, keepdims=True),
        }
        state, metrics = step(state, batch)
        goldens.assert_close(metrics["loss"], expected, 1e-9, f"loss before step {i}")

    for prefix, variables in (("final/", state.variables), ("ema/", state.ema)):
        weights = am.to_torch(variables)
        names = [key.removeprefix(prefix) for key in golden if key.startswith(prefix)]
        assert len(names) > 100, f"only {len(names)} goldens under {prefix}"
        for name in names:
            goldens.assert_close(weights[name], golden[prefix + name], 1e-9, prefix + name)


def test_no_average_is_kept_where_the_decay_is_zero():
    optimizer = optax.sgd(0.5)
    state = TrainState.create({"params": {"w": jnp.ones(2)}}, optimizer, ema_decay=0)
    assert state.ema is None
    step = make_step(sum_of("w"), optimizer)
    state, _ = step(state, {})
    assert state.ema is None
    np.testing.assert_array_equal(state.variables["params"]["w"], [0.5, 0.5])


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_an_average_that_warms_up_follows_from_the_first_steps(decay: float):
    """The average equals that of a loop over numbers; the weight falls from 3 by 1 per step."""
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"params": {"w": jnp.full((), 3.0)}}, optimizer, decay)
    step = jax.jit(make_step(sum_of("w"), optimizer, ema_decay=decay, ema_warmup=True))
    average = 3.0
    for number in range(40):
        state, _ = step(state, {})
        kept = min(decay, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * (2.0 - number)
        assert state.ema is not None
        ours = state.ema["params"]["w"]
        assert float(ours) == pytest.approx(average, rel=1e-5, abs=1e-5), f"step {number}"
    lag = float(ours - state.variables["params"]["w"])
    assert lag < 9, f"{lag:.1f} steps behind"


@pytest.mark.usefixtures("float64")
def test_an_average_that_warms_up_has_the_dtype_of_the_weights():
    optimizer = optax.sgd(1.0)
    variables = {"params": {"w": jnp.ones(2, jnp.float32)}}
    state = TrainState.create(variables, optimizer, 0.9)
    step = make_step(sum_of("w"), optimizer, ema_decay=0.9, ema_warmup=True)
    state, _ = step(state, {})
    assert state.ema is not None
    assert state.ema["params"]["w"].dtype == jnp.float32


def sum_of(name: str) -> Any:
    """Return a loss, the sum of the parameter `name`."""
    return lambda variables, *_: (variables["params"][name].sum(), {})


def test_what_a_model_keeps_beside_parameters_moves_and_is_averaged():
    """Here these are a running mean, and a count, which is not averaged."""

    def loss(variables: Any, batch: Any, key: jax.Array) -> Any:
        del key
        kept = variables["batch_stats"]
        moved = {"mean": 0.5 * kept["mean"] + batch["x"].mean(), "count": kept["count"] + 1}
        return variables["params"]["w"] * kept["mean"], {"batch_stats": moved}

    variables = {
        "params": {"w": jnp.ones(())},
        "batch_stats": {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)},
    }
    state = TrainState.create(variables, optax.sgd(1.0), ema_decay=0.9)
    step = make_step(loss, optax.sgd(1.0), ema_decay=0.9)
    state, metrics = step(state, {"x": jnp.arange(3.0)})
    assert state.ema is not None
    kept, averaged = state.variables["batch_stats"], state.ema["batch_stats"]
    assert float(kept["mean"]) == 1
    assert int(kept["count"]) == int(averaged["count"]) == 1
    assert averaged["count"].dtype == jnp.int32
    assert float(averaged["mean"]) == pytest.approx(0.1)
    assert float(metrics["loss"]) == 0


def test_random_numbers_follow_from_seed_and_step_alone():
    def loss(variables: Any, _: Any, key: jax.Array) -> Any:
        return variables["params"]["w"] * jax.random.uniform(key), {}

    def losses(seed: int, first: int) -> list[float]:
        step = make_step(loss, optax.sgd(0.0), seed=seed)
        state = TrainState.create({"params": {"w": jnp.ones(())}}, optax.sgd(0.0), 0)
        state = state.replace(step=jnp.asarray(first, jnp.int32))
        values = []
        for _ in range(3):
            state, metrics = step(state, {})
            values.append(float(metrics["loss"]))
        return values

    assert losses(0, 0)[1:] == losses(0, 1)[:2]
    assert len({*losses(0, 0), *losses(1, 0)}) == 6


def test_the_global_norm_leaves_of_a_model():
    params = goldens.rule_variables(micro())["params"]
    everything = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    expected, found = np.linalg.norm(everything.astype(np.float64)), global_norm(params)
    assert found == pytest.approx(expected, rel=1e-6)


def test_metrics_are_the_loss_the_rate_and_the_norms_of_gradient_and_weights():
    optimizer = optax.sgd(1.0)
    params = {"a": jnp.full(4, 3.0), "b": jnp.zeros(2)}
    state = TrainState.create({"params": params}, optimizer, 0)
    step = make_step(sum_of("a"), optimizer)
    _, metrics = step(state, {})
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 12.0,
        "learning_rate": pytest.approx(0.1),
        "gradient_norm": 2.0,
        "parameter_norm": 4.0,
    }


@pytest.mark.usefixtures("float64")
def test_a_batch_taken_in_parts_gives_the_same_step():
    params = {"first": goldens.normal(0, "a", (5, 7)), "second": goldens.normal(0, "b", (7, 4))}
    batch = {
        "image": goldens.normal(0, "image", (6, 5)),
        "target": jax.nn.softmax(goldens.normal(0, "target", (6, 4))),
    }

    def loss(variables: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        del key
        params = variables["params"]
        logits = jnp.tanh(batch["image"] @ params["first"]) @ params["second"]
        return soft_cross_entropy(logits, batch["target"]), {}

    optimizer = optax.sgd(0.1)
    found = []
    for parts in (1, 2):
        step = jax.jit(make_step(loss, optimizer, accumulation=parts))
        state, metrics = step(TrainState.create({"params": params}, optimizer, 0), batch)
        found.append((state.variables, metrics["loss"]))
    for ours, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        goldens.assert_close(ours, expected, 1e-12, "two parts instead of one")


def test_each_part_has_its_own_rows_and_random_numbers():
    def loss(variables: Any, rows: jax.Array, key: jax.Array) -> Any:
        return variables["params"]["w"] * rows.sum() + jax.random.uniform(key), {}

    def batch(values: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        del key
        return values["rows"]

    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, batch, accumulation=3)
    state = TrainState.create({"params": {"w": jnp.ones(())}}, optimizer, 0)
    _, metrics = step(state, {"rows": jnp.arange(6.0)})
    assert float(metrics["gradient_norm"]) == 5.0  # (0 + 1 + ... + 5) / 3
    noise = 3 * float(metrics["loss"]) - 15
    draws = 3 * float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), 0)))
    assert 0 < noise < 3
    assert noise != pytest.approx(draws), "one draw for all parts"
