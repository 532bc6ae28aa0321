"""Settings for tests that convert the same few models many times."""

import functools
from collections.abc import Iterator

import pytest

from activemlp_jax.weights import model_directory, torch_names

variable_shapes = functools.cache(torch_names.variable_shapes)


@pytest.fixture(scope="module", autouse=True)
def each_model_is_traced_once() -> Iterator[None]:
    """Cache the shapes of models, because computing them takes most of a conversion's time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_names, model_directory):
            patch.setattr(module, "variable_shapes", variable_shapes)
        yield
