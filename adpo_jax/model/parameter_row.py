"""The form of a row of the table of parameters: a name, axes, a tensor on disk, what may be done.

Letters, the axes of a parameter: V vocabulary, D model width, d model width of a vector, H heads, K
key/value heads, h head dimension, F width of the MLP, R rank of an adapter, E experts, f width of
an expert, S width of the shared expert, 1 a single number; of layers without a window where they
differ, G key/value heads, g head dimension; W width of the MLP of layers that share keys; of the
embeddings for each layer, U vocabulary, P width (p of a vector), Q width of all layers (q not
split); j outputs for a head of queries that have gates; of linear attention, N key heads, n key
dimension, M value heads, m value dimension, t taps of the convolution, X and Y what a key head has
of a fused weight. Parameters of a layer have a leading axis of the layers, which the rows leave
out.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adpo_jax.model.model_config import ModelConfig


class Axis(NamedTuple):
    """The meaning of a letter."""

    size: str | None  # the field of `ModelConfig` that is its length; None if none is
    logical: str | None  # its name in `sharding.RULES`; None if it is never split


AXES = {
    "V": Axis("vocab_size", "vocab"),
    "D": Axis("hidden_size", "embed"),
    "d": Axis("hidden_size", "norm"),  # never split: a vector is small and every device needs it
    "H": Axis("num_heads", "heads"),
    "K": Axis("num_kv_heads", "kv_heads"),
    "h": Axis("head_dim", "head_dim"),
    "F": Axis("intermediate_size", "mlp"),
    "R": Axis(None, "rank"),
    "E": Axis("mixture.num_experts", "expert"),
    "f": Axis("mixture.expert_size", "mlp"),
    "S": Axis("mixture.shared_size", "mlp"),
    "1": Axis("one", None),
    "G": Axis("global_layers.num_kv_heads", "kv_heads"),
    "g": Axis("global_layers.head_dim", "head_dim"),
    "W": Axis("shared_mlp_size", "mlp"),
    "U": Axis("per_layer_vocab_size", "vocab"),
    "P": Axis("per_layer_size", "mlp"),
    "p": Axis("per_layer_size", "norm"),
    "Q": Axis("per_layer_width", "embed"),
    "q": Axis("per_layer_width", None),
    "j": Axis("gated_query_size", "head_dim"),
    "N": Axis("linear_attention.num_key_heads", "heads"),
    "n": Axis("linear_attention.key_dim", "head_dim"),
    "M": Axis("linear_attention.num_value_heads", "heads"),
    "m": Axis("linear_attention.value_dim", "head_dim"),
    "t": Axis("linear_attention.taps", None),
    "X": Axis("linear_attention.group_size", None),
    "Y": Axis("linear_attention.group_numbers", None),
}


def _has_plain_heads(config: ModelConfig, layer: int) -> bool:
    return not config.is_global(layer) and not config.is_linear(layer)


# Which layers of a model have a parameter: (the model, the number of a layer) -> bool.
LAYERS: Mapping[str, Callable[[ModelConfig, int], bool]] = {
    "all": lambda c, layer: True,
    # Those with an MLP, but for those that share keys where theirs is wider.
    "mlp": lambda c, layer: (
        (c.mixture is None or c.mixture.beside_mlp or layer in c.mlp_layers)
        and (c.has_own_keys(layer) or not c.shared_mlp_size)
    ),
    # Those with a mixture of experts.
    "mixture": lambda c, layer: c.mixture is not None and layer not in c.mlp_layers,
    # Those that share the keys of earlier ones.
    "shared": lambda c, layer: not c.has_own_keys(layer),
    # Those of linear attention.
    "linear": lambda c, layer: c.is_linear(layer),
    # All others, but for those without a window where these have other shapes.
    "local": _has_plain_heads,
    # Those of them with keys of their own.
    "local_kv": lambda c, layer: _has_plain_heads(c, layer) and c.has_own_keys(layer),
    # Those without a window where they have other shapes than those with one.
    "global": lambda c, layer: c.is_global(layer),
    # Those of them with keys of their own.
    "global_kv": lambda c, layer: c.is_global(layer) and c.has_own_keys(layer),
}

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def _normal(config: ModelConfig) -> Initializer:
    return nn.initializers.normal(config.initializer_range)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
      name: its name in the parameter tree. A row that takes the place of another one in some layers
        or models has that one's name behind a prefix of `parameter_table.PREFIXES`.
      axes: its letters in the tree.
      hf_name: its tensor in a checkpoint, below `model.layers.<i>.` for a parameter of a layer.
        Rows of a model that have one tensor are its parts along the axis `parted`. "{}" is the
        number of the expert, if each has a tensor of its own.
      hf_axes: the same letters on disk; "Hh D" is a matrix [H * h, D]. The first letter is E, the
        number in the name, where each expert has a tensor of its own.
      parted: the axis on disk along which rows that have one tensor are its parts.
      alternates: whether the rows that have one tensor take turns along its last axis instead.
      when: whether a model has it. Rows of one name differ in this, in their form on disk and in
        whether they may have an adapter.
      layers: which layers have it, one of `LAYERS`.
      init: how random weights are drawn; None for adapters, which `Lora.init` draws.
      decays: whether weight decay applies.
      keeps_dtype: whether decoding leaves it in the dtype of the parameters, since the arithmetic
        with it is float32 whatever the dtype of the computation.
      is_float32: whether it is float32 in memory and on disk whatever the other parameters are, as
        transformers keeps it: rounded, the bias of a router would choose other experts.
      adapter_inputs: how many leading axes the A of an adapter sums over, that of the experts not
        counted; 0 if the parameter may have no adapter.
      turned_in_peft: whether peft takes its inputs for outputs, so that peft's A and B are the B
        and A of this adapter (Llama 4, whose experts do not say which is which).
      joined: the name of the matrix that `cpu` makes of this parameter and the others with the same
        input; "" for none.
    """

    name: str
    axes: str
    hf_name: str
    hf_axes: str
    parted: int = 0
    alternates: bool = False
    when: Callable[[ModelConfig], bool] = lambda config: True
    layers: str = "all"
    init: Callable[[ModelConfig], Initializer] | None = _normal
    decays: bool = True
    keeps_dtype: bool = False
    is_float32: bool = False
    adapter_inputs: int = 0
    turned_in_peft: bool = False
    joined: str = ""

    def __post_init__(self):
        assert self.layers in LAYERS, f"{self.name}: layers={self.layers!r}, none of {[*LAYERS]}"

    def dtype(self, usual: Any) -> Any:
        """Its dtype where that of most parameters is `usual`."""
        return jnp.float32 if self.is_float32 else usual

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Its shape in a model, without the layer axis."""
        return tuple(operator.attrgetter(AXES[letter].size)(config) for letter in self.axes)

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        return tuple(AXES[letter].logical for letter in self.axes)

    @property
    def experts(self) -> str:
        """The letter of the experts if it has weights of each, else ""."""
        return self.axes[:1] if self.axes[:1] == "E" else ""

    @property
    def one_tensor_for_all(self) -> bool:
        """Whether one tensor of a layer holds the matrices of all experts."""
        return bool(self.experts) and not self.one_tensor_each

    @property
    def one_tensor_each(self) -> bool:
        """Whether each expert has a tensor of its own on disk."""
        return "{}" in self.hf_name

    def layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        """The numbers of the layers that have it, in order."""
        has = LAYERS[self.layers]
        return tuple(layer for layer in range(config.num_layers) if has(config, layer))

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from the letters on disk to those of the tree."""
        return tuple(self.hf_axes.replace(" ", "").index(letter) for letter in self.axes)

    @property
    def hf_module(self) -> str:
        """The Hugging Face module that holds it, or its own name there if it is no `weight`."""
        return self.hf_name.removesuffix(".weight")
