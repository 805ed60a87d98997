"""Where every parameter lies in a Hugging Face checkpoint; loading and saving both follow it.

Letters: V vocabulary, D model width, H heads, K key/value heads, h head dimension, F width of the
MLP.
"""

import dataclasses
import functools
import math
import re

from adpo_jax.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter's place in a checkpoint.

    Attributes:
      hf_name: below `model.layers.<i>.` for a parameter of a layer.
      hf_axes: the dimensions on disk; "Hh D" is a matrix [H * h, D].
      axes: the same letters in the order of the parameter tree (without its leading layers).
    """

    hf_name: str
    hf_axes: str
    axes: str

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from the letters on disk to those of the tree."""
        return tuple(self.hf_axes.replace(" ", "").index(axis) for axis in self.axes)


TOP_TENSORS = {
    "embed": Tensor("model.embed_tokens.weight", "V D", "VD"),
    "final_norm": Tensor("model.norm.weight", "D", "D"),
    "head": Tensor("lm_head.weight", "V D", "DV"),
}
LAYER_TENSORS = {
    "attn_norm": Tensor("input_layernorm.weight", "D", "D"),
    "q": Tensor("self_attn.q_proj.weight", "Hh D", "DHh"),
    "k": Tensor("self_attn.k_proj.weight", "Kh D", "DKh"),
    "v": Tensor("self_attn.v_proj.weight", "Kh D", "DKh"),
    "o": Tensor("self_attn.o_proj.weight", "D Hh", "HhD"),
    "q_bias": Tensor("self_attn.q_proj.bias", "Hh", "Hh"),
    "k_bias": Tensor("self_attn.k_proj.bias", "Kh", "Kh"),
    "v_bias": Tensor("self_attn.v_proj.bias", "Kh", "Kh"),
    "o_bias": Tensor("self_attn.o_proj.bias", "D", "D"),
    "q_norm": Tensor("self_attn.q_norm.weight", "h", "h"),
    "k_norm": Tensor("self_attn.k_norm.weight", "h", "h"),
    "mlp_norm": Tensor("post_attention_layernorm.weight", "D", "D"),
    "gate": Tensor("mlp.gate_proj.weight", "F D", "DF"),
    "up": Tensor("mlp.up_proj.weight", "F D", "DF"),
    "down": Tensor("mlp.down_proj.weight", "D F", "FD"),
    "gate_bias": Tensor("mlp.gate_proj.bias", "F", "F"),
    "up_bias": Tensor("mlp.up_proj.bias", "F", "F"),
    "down_bias": Tensor("mlp.down_proj.bias", "D", "D"),
}
# Gemma 2 and 3 put a norm on either side of attention and MLP: the same name, another place.
POST_NORM_TENSORS = {
    "attn_post_norm": Tensor("post_attention_layernorm.weight", "D", "D"),
    "mlp_norm": Tensor("pre_feedforward_layernorm.weight", "D", "D"),
    "mlp_post_norm": Tensor("post_feedforward_layernorm.weight", "D", "D"),
}

# Buffers that old versions of transformers wrote, computed from the config.
HARMLESS_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# A Gemma 3 checkpoint with pictures: the language model's prefixes, and what is left out.
GEMMA3_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
GEMMA3_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a model: its tensors on disk, one a layer (or one alone)."""

    path: tuple[str, ...]
    tensor: Tensor
    hf_names: tuple[str, ...]
    split_shape: tuple[int, ...]  # on disk, one dimension a letter
    hf_shape: tuple[int, ...]

    def of(self, params):
        """This leaf of a parameter tree."""
        return functools.reduce(lambda tree, key: tree[key], self.path, params)

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from disk to tree, stacked layers included."""
        if not self.stacked:
            return self.tensor.order
        return (0, *(axis + 1 for axis in self.tensor.order))


def leaves(config: ModelConfig, params) -> list[Leaf]:
    """The checkpoint's view of a parameter tree, in the order of a checkpoint.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
    """
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "F": config.intermediate_size,
    }
    layer_tensors = LAYER_TENSORS | (POST_NORM_TENSORS if config.post_norms else {})

    def leaf(path, tensor, hf_names):
        groups = [[sizes[axis] for axis in group] for group in tensor.hf_axes.split()]
        split_shape = tuple(size for group in groups for size in group)
        return Leaf(path, tensor, hf_names, split_shape, tuple(math.prod(g) for g in groups))

    found = []
    for name, param in params["layers"].items():
        tensor = layer_tensors[name]
        hf_names = tuple(f"model.layers.{i}.{tensor.hf_name}" for i in range(param.shape[0]))
        found.append(leaf(("layers", name), tensor, hf_names))
    for name in params.keys() - {"layers"}:
        found.append(leaf((name,), TOP_TENSORS[name], (TOP_TENSORS[name].hf_name,)))
    order = [*TOP_TENSORS, *layer_tensors]
    return sorted(found, key=lambda leaf: order.index(leaf.path[-1]))
