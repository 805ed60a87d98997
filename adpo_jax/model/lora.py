"""LoRA: low-rank adapters beside frozen weights, in one parameter tree.

A weight W [*in, *out] of a layer may have an adapter A [*in, R], B [R, *out] beside it, and then
acts as W + scale A B. The tree holds the three as "q", "q_lora_a" and "q_lora_b". Where a tree has
adapters, they alone are trained; `split` says for every tree what is trained.

Source: Hu et al. 2021, arXiv 2106.09685.

Letters: L layers, R rank.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.model import parameters
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.parameters import adapter_names, is_adapter

ALL_TARGETS = "all-linear"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
      rank: R.
      alpha: A B is multiplied by alpha / rank, so that another rank needs no other learning rate.
      targets: the weights that have an adapter, some of `parameters.adaptable()`. A policy leaves
        out those that its model does not have.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(parameters.adaptable())

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"the rank of LoRA is at least 1, given {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of LoRA is above 0 and finite, given {self.alpha}")
        known = parameters.adaptable()
        if not self.targets or not known.keys() >= set(self.targets):
            raise ValueError(
                f"LoRA adapts some of {hf_names(known)}; given {hf_names(self.targets) or 'none'}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def of_model(self, config: ModelConfig) -> "Lora":
        """These adapters on the weights that a model has.

        Raises:
          ValueError: when it has none of them.
        """
        held = parameters.adaptable(config)
        targets = tuple(name for name in self.targets if name in held)
        if not targets:
            raise ValueError(
                f"LoRA adapts {hf_names(self.targets)}, of which this model has none; it has "
                f"{hf_names(held)}"
            )
        return dataclasses.replace(self, targets=targets)

    def init(self, key: jax.Array, layers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """New adapters, which change nothing yet.

        B is 0, and A is uniform within 1 / sqrt(inputs), as in peft.

        Args:
          layers: the stacked weights, [L, *in, *out] each, or [L, E, *in, *out] of experts.

        Returns:
          A [L, *in, R] and B [L, R, *out] of every target, float32, by their names in the tree; of
          experts [L, E, *in, R] and [L, E, R, *out].
        """
        adapters = {}
        for i, (name, row) in enumerate(parameters.adaptable().items()):
            if name not in self.targets:
                continue
            first = 1 + len(row.experts)
            stack, shape = layers[name].shape[:first], layers[name].shape[first:]
            inputs, outputs = shape[: row.adapter_inputs], shape[row.adapter_inputs :]
            bound = 1.0 / math.sqrt(math.prod(inputs))
            a, b = adapter_names(name)
            adapters[a] = jax.random.uniform(
                jax.random.fold_in(key, i),
                (*stack, *inputs, self.rank),
                minval=-bound,
                maxval=bound,
            )
            adapters[b] = jnp.zeros((*stack, self.rank, *outputs))
        return adapters


def parse_targets(text: str) -> tuple[str, ...]:
    """The weights that a text names, such as "q_proj,v_proj".

    "all-linear" names all weights but embeddings, head and routers. "gate_proj" names that of an
    MLP, of every expert and of a shared expert; "qkv_proj" names the three parts of it, and
    "gate_up_proj" both of its own, those of experts included.
    """
    if text == ALL_TARGETS:
        return tuple(parameters.adaptable())
    named = collections.defaultdict(list)
    for module in parameters.adapted_modules():
        named[module.rpartition(".")[2]] += parameters.of_module(module)
    given = [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(name for part in given for name in named.get(part, (part,))))


def hf_name(name: str) -> str:
    """The name of a weight in Hugging Face and peft: the last part of its module's name."""
    row = parameters.adaptable().get(name)
    return row.hf_module.rpartition(".")[2] if row else name


def hf_names(names: Iterable[str]) -> str:
    """The names of weights in Hugging Face for a sentence, each once."""
    return ", ".join(dict.fromkeys(map(hf_name, names)))


def split(params) -> tuple[Any, Any]:
    """The trained and the frozen part of a tree: adapters and weights, or all and nothing.

    Args:
      params: a parameter tree of arrays, shapes or shardings.
    """
    adapters = {name: leaf for name, leaf in params["layers"].items() if is_adapter(name)}
    if not adapters:
        return params, {"layers": {}}
    return {"layers": adapters}, without_adapters(params)


def without_adapters(params) -> Any:
    """The tree of the weights alone."""
    weights = {name: leaf for name, leaf in params["layers"].items() if not is_adapter(name)}
    return {**params, "layers": weights}


def join(trained, frozen) -> Any:
    """The parameter tree that `split` took these parts from."""
    return {**frozen, **trained, "layers": {**frozen["layers"], **trained["layers"]}}


def adapter_of(params, name: str) -> tuple[jax.Array, jax.Array] | None:
    """A and B of a weight of the layers, all layers together; None where it has none."""
    a, b = adapter_names(name)
    return (params["layers"][a], params["layers"][b]) if a in params["layers"] else None


@jax.jit
def checksum(tree) -> jax.Array:
    """The bits of all leaves added up, uint32; the same for every layout on devices."""

    def bit_sum(leaf):
        size = 8 * leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{size}"))
        # The factors are odd and differ by leaf, so that two swapped leaves change the sum.
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    sums = [bit_sum(leaf) * np.uint32(2 * i + 1) for i, leaf in enumerate(jax.tree.leaves(tree))]
    return functools.reduce(jnp.add, sums, jnp.uint32(0))


def merged(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B in float32, of one layer.

    In bfloat16 the sum would mostly round to W again: the next numbers lie 0.4 to 0.8% away, and an
    adapter has learned less than half of that after a few steps.
    """
    product = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1)
    return weight.astype(jnp.float32) + scale * product


def merged_layer(layer: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """One layer's parameters with its adapters merged; weights that had one become float32."""
    plain = {name: leaf for name, leaf in layer.items() if not is_adapter(name)}
    for name in plain:
        a, b = adapter_names(name)
        if a in layer:
            has_experts = parameters.adaptable()[name].experts
            merge = jax.vmap(merged, (0, 0, 0, None)) if has_experts else merged
            plain[name] = merge(plain[name], layer[a], layer[b], scale)
    return plain
