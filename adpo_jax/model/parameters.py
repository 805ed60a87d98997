"""Every parameter of a model, declared once in one row of a table.

The rows decide the tree of random parameters (`init`), its layout on a mesh (`logical_axes`), the
tensors of a Hugging Face folder (`hf/tensors.py`), adapters (`lora`), weight decay
(`update/optimizer.py`), the dtypes of decoding (`engine/verbs.py`) and the matrices that a CPU
joins (`cpu`). A new parameter is a row here and a line in the function that uses it.

Letters, the axes of a parameter: V vocabulary, D model width, d model width of a vector, H heads, K
key/value heads, h head dimension, F width of the MLP, R rank of an adapter. Parameters of a layer
have a leading axis of the layers, which the rows leave out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from adpo_jax.model.model_config import ModelConfig


class Axis(NamedTuple):
    """The meaning of a letter."""

    size: str | None  # the field of `ModelConfig` that is its length; None if none is
    logical: str  # its name in `sharding.RULES`


AXES = {
    "V": Axis("vocab_size", "vocab"),
    "D": Axis("hidden_size", "embed"),
    "d": Axis("hidden_size", "norm"),  # never split: a vector is small and every device needs it
    "H": Axis("num_heads", "heads"),
    "K": Axis("num_kv_heads", "kv_heads"),
    "h": Axis("head_dim", "head_dim"),
    "F": Axis("intermediate_size", "mlp"),
    "R": Axis(None, "rank"),
}

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def _normal(config: ModelConfig) -> Initializer:
    return nn.initializers.normal(config.initializer_range)


def _zeros(config: ModelConfig) -> Initializer:
    return nn.initializers.zeros


def _identity(config: ModelConfig) -> Initializer:
    """The initializer of a norm that leaves the scale as it is."""
    return nn.initializers.zeros if config.norm_plus_one else nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
      name: its name in the parameter tree.
      axes: its letters in the tree.
      hf_name: its tensor in a checkpoint, below `model.layers.<i>.` for a parameter of a layer.
        Rows of a model that have one tensor are its parts along the first axis on disk.
      hf_axes: the same letters on disk; "Hh D" is a matrix [H * h, D].
      when: whether a model has it. Rows of one name differ in this and in `hf_name` alone.
      init: how random weights are drawn; None for adapters, which `Lora.init` draws.
      decays: whether weight decay applies.
      wide: whether decoding leaves it in the dtype of the parameters, since the arithmetic with it
        is float32 whatever the dtype of the computation.
      adapter_inputs: how many leading axes the A of an adapter sums over; 0 if the parameter may
        have no adapter.
      joined: the name of the matrix that `cpu` makes of this parameter and the others with the same
        input; "" for none.
    """

    name: str
    axes: str
    hf_name: str
    hf_axes: str
    when: Callable[[ModelConfig], bool] = lambda config: True
    init: Callable[[ModelConfig], Initializer] | None = _normal
    decays: bool = True
    wide: bool = False
    adapter_inputs: int = 0
    joined: str = ""

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Its shape in a model, without the layer axis."""
        return tuple(getattr(config, AXES[letter].size) for letter in self.axes)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        return tuple(AXES[letter].logical for letter in self.axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from the letters on disk to those of the tree."""
        return tuple(self.hf_axes.replace(" ", "").index(letter) for letter in self.axes)

    @property
    def hf_module(self) -> str:
        """The Hugging Face module that holds it."""
        return self.hf_name.rpartition(".")[0]

    def adapter(self) -> tuple["Parameter", "Parameter"]:
        """The rows of its A [*in, R] and B [R, *out], which peft keeps as [R, in] and [out, R]."""
        inputs, outputs = self.axes[: self.adapter_inputs], self.axes[self.adapter_inputs :]
        a, b = adapter_names(self.name)
        return (
            Parameter(a, f"{inputs}R", f"{self.hf_module}.lora_A.weight", f"R {inputs}", init=None),
            Parameter(
                b, f"R{outputs}", f"{self.hf_module}.lora_B.weight", f"{outputs} R", init=None
            ),
        )


def _norm(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(name, axes, hf_name, axes, init=_identity, decays=False, wide=True, **settings)


def _bias(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(name, axes, hf_name, axes, init=_zeros, decays=False, **settings)


def _input(name: str, axes: str, module: str, hf_axes: str, **settings) -> Parameter:
    """A weight [in, *out] of a layer that reads the width of the model."""
    return Parameter(name, axes, f"{module}.weight", hf_axes, adapter_inputs=1, **settings)


def _post_norms(config: ModelConfig) -> bool:
    return config.post_norms and not config.norms_named_after_parts


def _named_after_parts(config: ModelConfig) -> bool:
    return config.post_norms and config.norms_named_after_parts


def _fused_qkv(config: ModelConfig) -> bool:
    return config.fused_qkv


def _separate_qkv(config: ModelConfig) -> bool:
    return not config.fused_qkv


def _fused_gate(config: ModelConfig) -> bool:
    return config.fused_gate_up


def _separate_gate(config: ModelConfig) -> bool:
    return not config.fused_gate_up


# The order of the rows is part of a seed's meaning: flax counts a parameter's key by its place.
TOP = (
    Parameter("embed", "VD", "model.embed_tokens.weight", "V D"),
    _norm("final_norm", "d", "model.norm.weight"),
    Parameter("head", "DV", "lm_head.weight", "V D", when=lambda c: not c.tie_embeddings),
)
LAYER = (
    _norm("attn_norm", "d", "input_layernorm.weight", when=lambda c: c.pre_norms),
    _input("q", "DHh", "self_attn.q_proj", "Hh D", joined="qkv", when=_separate_qkv),
    _input("k", "DKh", "self_attn.k_proj", "Kh D", joined="qkv", when=_separate_qkv),
    _input("v", "DKh", "self_attn.v_proj", "Kh D", joined="qkv", when=_separate_qkv),
    # Rows with one tensor are its parts, in this order.
    _input("q", "DHh", "self_attn.qkv_proj", "Hh D", joined="qkv", when=_fused_qkv),
    _input("k", "DKh", "self_attn.qkv_proj", "Kh D", joined="qkv", when=_fused_qkv),
    _input("v", "DKh", "self_attn.qkv_proj", "Kh D", joined="qkv", when=_fused_qkv),
    _bias("q_bias", "Hh", "self_attn.q_proj.bias", when=lambda c: c.qkv_bias),
    _bias("k_bias", "Kh", "self_attn.k_proj.bias", when=lambda c: c.qkv_bias),
    _bias("v_bias", "Kh", "self_attn.v_proj.bias", when=lambda c: c.qkv_bias),
    _norm("q_norm", "h", "self_attn.q_norm.weight", when=lambda c: c.qk_norm),
    _norm("k_norm", "h", "self_attn.k_norm.weight", when=lambda c: c.qk_norm),
    _norm("q_norm_all", "Hh", "self_attn.q_norm.weight", when=lambda c: c.qk_norm_over_heads),
    _norm("k_norm_all", "Kh", "self_attn.k_norm.weight", when=lambda c: c.qk_norm_over_heads),
    Parameter("o", "HhD", "self_attn.o_proj.weight", "D Hh", adapter_inputs=2),
    _bias("o_bias", "d", "self_attn.o_proj.bias", when=lambda c: c.out_bias),
    # Some models have a norm on either side of attention and MLP, so a name has several places.
    _norm("attn_post_norm", "d", "post_attention_layernorm.weight", when=_post_norms),
    _norm("attn_post_norm", "d", "post_self_attn_layernorm.weight", when=_named_after_parts),
    _norm(
        "mlp_norm",
        "d",
        "pre_feedforward_layernorm.weight",
        when=lambda c: c.pre_norms and _post_norms(c),
    ),
    _norm(
        "mlp_norm",
        "d",
        "post_attention_layernorm.weight",
        when=lambda c: c.pre_norms and not _post_norms(c),
    ),
    _input("gate", "DF", "mlp.gate_proj", "F D", joined="gate_up", when=_separate_gate),
    _input("up", "DF", "mlp.up_proj", "F D", joined="gate_up", when=_separate_gate),
    _input("gate", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", when=_fused_gate),
    _input("up", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", when=_fused_gate),
    _bias("gate_bias", "F", "mlp.gate_proj.bias", when=lambda c: c.mlp_bias),
    _bias("up_bias", "F", "mlp.up_proj.bias", when=lambda c: c.mlp_bias),
    Parameter("down", "FD", "mlp.down_proj.weight", "D F", adapter_inputs=1),
    _bias("down_bias", "d", "mlp.down_proj.bias", when=lambda c: c.mlp_bias),
    _norm("mlp_post_norm", "d", "post_feedforward_layernorm.weight", when=_post_norms),
    _norm("mlp_post_norm", "d", "post_mlp_layernorm.weight", when=_named_after_parts),
)

# The place of a parameter in the tree: ("embed",) or ("layers", "q").
Path = tuple[str, ...]


def of_model(config: ModelConfig) -> dict[Path, Parameter]:
    """The parameters of a model without adapters, in the order of the table."""
    top = {(row.name,): row for row in TOP if row.when(config)}
    return top | {("layers", row.name): row for row in LAYER if row.when(config)}


def has(config: ModelConfig, name: str) -> bool:
    """Whether the layers of a model have a parameter of this name."""
    return any(row.name == name and row.when(config) for row in LAYER)


def at(path: Path) -> Parameter:
    """The row of a place in some model's tree, adapters included.

    Raises:
      ValueError: for a place that no row names.
    """
    if path[0] != "layers":
        rows = TOP if len(path) == 1 else ()
    elif is_adapter(path[-1]):
        rows = (adapter for row in LAYER if row.adapter_inputs for adapter in row.adapter())
    else:
        rows = LAYER
    for row in rows:
        if row.name == path[-1]:
            return row
    raise ValueError(f"no row of the table of parameters is named {'/'.join(path)}")


def by_path(params) -> dict[Path, Any]:
    """A parameter tree as a flat dict."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def logical_axes(params) -> Any:
    """The tree of logical axes of a parameter tree.

    Raises:
      ValueError: naming the parameters that the table does not have.
    """
    uncovered = []

    def axes_of(path, leaf):
        path = tuple(key.key for key in path)
        try:
            axes = at(path).logical_axes
        except ValueError:
            uncovered.append(f"{'/'.join(path)} {tuple(leaf.shape)}")
            return ()
        return ("layers", *axes) if path[0] == "layers" else axes

    axes = jax.tree_util.tree_map_with_path(axes_of, params)
    if uncovered:
        raise ValueError("no logical axes for the parameters: " + ", ".join(uncovered))
    return axes


# --- adapters


def adaptable() -> Mapping[str, Parameter]:
    """The weights of a layer that may have an adapter, by name."""
    rows = {}
    for row in LAYER:
        if row.adapter_inputs:
            rows.setdefault(row.name, row)
    return rows


def of_module(hf_module: str) -> tuple[str, ...]:
    """The names of the weights with adapters that a Hugging Face module holds, in its order."""
    rows = [row for row in LAYER if row.adapter_inputs and row.hf_module == hf_module]
    return tuple(row.name for row in rows)


def adapted_modules() -> tuple[str, ...]:
    """The Hugging Face modules, of any model, whose weights may have an adapter."""
    return tuple(dict.fromkeys(row.hf_module for row in LAYER if row.adapter_inputs))


def adapter_names(name: str) -> tuple[str, str]:
    """The names of a weight's A and B."""
    return f"{name}_lora_a", f"{name}_lora_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter of a layer is an A or a B."""
    return name.endswith(adapter_names(""))


# --- random weights


def init(config: ModelConfig, key: jax.Array, dtype) -> dict[str, Any]:
    """Random parameters, those of the layers stacked [L, ...]."""
    return _Model(config, dtype).init(key)["params"]


class _Model(nn.Module):
    """Declares all parameters of a model to flax, which draws each by a key of its own."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self):
        _declare(self, TOP)
        stack = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
        )
        stack(self.config, self.dtype, name="layers")(None)


class _Layer(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, carry):
        _declare(self, LAYER)
        return carry, None


def _declare(module: _Model | _Layer, rows: tuple[Parameter, ...]) -> None:
    for row in rows:
        if row.when(module.config):
            module.param(row.name, row.init(module.config), row.shape(module.config), module.dtype)
