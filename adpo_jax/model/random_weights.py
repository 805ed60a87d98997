"""Random parameters of a model.

The rows of `parameter_table` say how each is drawn.

Letters: L layers.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax

from adpo_jax.model import parameter_table
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.parameter_row import Parameter


def init(config: ModelConfig, key: jax.Array, dtype) -> dict[str, Any]:
    """Random parameters, those of the layers stacked [L, ...]."""
    params = _Model(config, dtype).init(key)["params"]
    layers = [params.pop(name) for name in tuple(params) if name.startswith("layers")]
    return {**params, "layers": {name: leaf for part in layers for name, leaf in part.items()}}


class _Model(nn.Module):
    """Declares all parameters of a model to flax, which draws each by a key of its own."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self):
        _declare(self, parameter_table.TOP)
        config = self.config
        for length, group in itertools.groupby(_by_length(config), lambda each: each[0]):
            stack = nn.scan(
                _Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=length,
            )
            rows = tuple(row for _, row in group)
            name = "layers" if length == config.num_layers else f"layers_{rows[0].layers}"
            stack(config, self.dtype, rows, name=name)(None)


def _by_length(config: ModelConfig) -> list[tuple[int, Parameter]]:
    """The parameters of the layers, those that all layers have first."""
    rows = [(len(row.layers_of(config)), row) for row in parameter_table.LAYER if row.when(config)]
    return sorted(rows, key=lambda each: -each[0])


class _Layer(nn.Module):
    config: ModelConfig
    dtype: Any
    rows: tuple[Parameter, ...]

    @nn.compact
    def __call__(self, carry):
        _declare(self, self.rows)
        return carry, None


def _declare(module: _Model | _Layer, rows: tuple[Parameter, ...]) -> None:
    for row in rows:
        if row.when(module.config):
            init, shape = row.init(module.config), row.shape(module.config)
            module.param(row.name, init, shape, row.dtype(module.dtype))
