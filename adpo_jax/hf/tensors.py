"""The place of every parameter in a Hugging Face checkpoint, for loading and saving.

The table of parameters (`model/parameter_table.py`) has the names and the axes on disk.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from adpo_jax.model import parameters
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.parameter_row import Parameter
from adpo_jax.model.parameters import Path

# Buffers that old versions of transformers wrote, computed from the config.
HARMLESS_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# The prefixes of the language model in a checkpoint with vision, and what is left out.
WRAPPED_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
VISION = re.compile(
    r"^(model\.)?(vision_tower|multi_modal_projector|embed_vision|audio_tower|embed_audio|"
    r"vision_model|visual)\."
)
# Layers that predict further tokens, in files of Qwen.
FURTHER = "mtp."
# What files of Gemma 4 hold of layers that take the keys and values of others.
KEYS_AND_VALUES = re.compile(r"^model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a model: its tensors on disk, one a layer (or expert of it), or one alone.

    Attributes:
      path: its place in the tree.
      hf_names: its tensors; those of the experts of a layer stand side by side.
      stack: how many tensors there are along each leading axis: (), (layers,) or (layers, experts).
      layers: the numbers of the layers that have it.
      sizes: those of the letters of its axes.
      start: where it begins on the axis of its tensors that it shares with others: the last one
        where it alternates with them, else `Parameter.parted`.
      length: the size of that axis; None for its own.
    """

    path: Path
    parameter: Parameter
    hf_names: tuple[str, ...]
    stack: tuple[int, ...]
    layers: Sequence[int]
    sizes: tuple[int, ...]
    start: int = 0
    length: int | None = None

    def of(self, params):
        """This leaf of a parameter tree."""
        return functools.reduce(lambda tree, key: tree[key], self.path, params)

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    def place(self, tensor: int) -> tuple[int, ...]:
        """The index of a tensor, by its number, in the leading axes of the tree."""
        return tuple(int(i) for i in np.unravel_index(tensor, self.stack))

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The shape of a tensor on disk, reshaped to one dimension a letter."""
        return tuple(size for group in self._groups for size in group)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of its part of a tensor on disk."""
        return tuple(map(math.prod, self._groups))

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of a whole tensor on disk."""
        shape = list(self.part_shape)
        if self.length is not None:
            shape[self._axis] = self.length
        return tuple(shape)

    def part(self, tensor):
        """Its part of a tensor on disk, an array or what is indexed like one."""
        if self.parameter.alternates and self.length is not None:
            return tensor[..., self.start :: self.length // self.part_shape[-1]]
        axis = self._axis
        own = slice(self.start, self.start + self.part_shape[axis])
        return tensor[(*(slice(None),) * axis, own)]

    @property
    def _axis(self) -> int:
        """The axis of its tensors that it may share with others."""
        return len(self._groups) - 1 if self.parameter.alternates else self.parameter.parted

    @property
    def _groups(self) -> list[list[int]]:
        sizes = dict(zip(self.parameter.axes, self.sizes))
        groups = [[sizes[letter] for letter in group] for group in self.parameter.hf_axes.split()]
        return groups[1:] if self.parameter.one_tensor_each else groups

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from disk to tree, stacked layers included."""
        if not self.stacked:
            return self.parameter.order
        return (0, *(axis + 1 for axis in self.parameter.order))

    @property
    def disk_order(self) -> tuple[int, ...]:
        """The transposition of one tensor from the tree to disk."""
        order = self.parameter.order
        if self.parameter.one_tensor_each:
            order = tuple(axis - 1 for axis in order[1:])
        return tuple(np.argsort(order).tolist())


def is_read_nowhere(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is one that a checkpoint may hold without a use."""
    shared = KEYS_AND_VALUES.match(name)
    layer = int(shared[1][:9]) if shared else config.num_layers
    unused = layer < config.num_layers and not config.has_own_keys(layer)
    return unused or bool(HARMLESS_TENSORS.search(name))


def layer_tensor(layer: int, hf_name: str) -> str:
    """The whole name of a layer's tensor."""
    return f"model.layers.{layer}.{hf_name}"


def layer_of(name: str) -> int:
    """The number of the layer that a tensor is part of; -1 for none."""
    found = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


def leaves(config: ModelConfig, params) -> list[Leaf]:
    """The checkpoint's view of a parameter tree, in the order of the table.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s, adapters or weights or both.
    """

    def leaf(path, row, param):
        if path[0] != "layers":
            return Leaf(path, row, (row.hf_name,), (), (), tuple(param.shape))
        L, *sizes = param.shape
        layers = row.layers_of(config)
        assert len(layers) == L, f"{path} has {L} layers, not {len(layers)}"
        experts = (sizes[0],) if row.one_tensor_each else ()
        names = tuple(
            layer_tensor(layer, row.hf_name.format(expert))
            for layer in layers
            for expert in range(math.prod(experts))
        )
        return Leaf(path, row, names, (L, *experts), layers, tuple(sizes))

    held = parameters.by_path(params)
    rows = parameters.of_model(config)
    for row in tuple(rows.values()):
        if row.adapter_inputs:
            rows |= {("layers", adapter.name): adapter for adapter in parameters.adapter_rows(row)}
    unknown = held.keys() - rows.keys()
    assert not unknown, f"parameters that the table does not give this model: {unknown}"
    whole = [leaf(path, row, held[path]) for path, row in rows.items() if path in held]
    return [part for parts in by_tensor(whole) for part in _placed(parts)]


def by_tensor(all_leaves: list[Leaf]) -> list[list[Leaf]]:
    """The leaves in groups that have the same tensors on disk, in the order of their parts."""
    groups = {}
    for leaf in all_leaves:
        groups.setdefault(leaf.hf_names, []).append(leaf)
    return list(groups.values())


def joined(parts: list[Leaf], arrays: list[np.ndarray]) -> np.ndarray:
    """A tensor on disk from its parts, those of the leaves of one group."""
    if len(arrays) == 1:
        return arrays[0]
    if parts[0].parameter.alternates:
        return np.stack(arrays, axis=-1).reshape(parts[0].hf_shape)
    return np.concatenate(arrays, axis=parts[0].parameter.parted)


def _placed(parts: list[Leaf]) -> list[Leaf]:
    """The leaves of one group with their places on the axis of their tensors that they share."""
    if len(parts) == 1:
        return parts
    if parts[0].parameter.alternates:
        length = len(parts) * parts[0].part_shape[-1]
        return [dataclasses.replace(p, start=i, length=length) for i, p in enumerate(parts)]
    ends = np.cumsum([part.part_shape[part.parameter.parted] for part in parts]).tolist()
    return [
        dataclasses.replace(part, start=start, length=ends[-1])
        for part, start in zip(parts, [0, *ends])
    ]
