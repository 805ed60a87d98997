"""What a `config.json` of Gemma 4 says besides that of Gemma 3: layers of two shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

from adpo_jax.hf.values import positive_int
from adpo_jax.model.model_config import GlobalLayers, Mixture

# The settings that a file of transformers may give for single layers.
PER_LAYER_KEYS = ("head_dim", "num_key_value_heads")


def global_sizes(c: Mapping[str, Any], layer_types: Sequence[str]) -> tuple[int, int]:
    """(num_kv_heads, head_dim) of the layers without a window.

    Files have `global_head_dim` and `num_global_key_value_heads`, or, as transformers writes them
    from 5.24 on, the sizes of single layers in `per_layer_config`, whose keys are numbers of layers
    with zeros in front of the shorter ones ("05", "11").

    Raises:
      ValueError: for sizes that are no positive integers, or that differ among these layers.
    """
    given = c["per_layer_config"]
    if given is None:
        own_heads = c["attention_k_eq_v"] and c["num_global_key_value_heads"] is not None
        heads = "num_global_key_value_heads" if own_heads else "num_key_value_heads"
        return positive_int(c, heads), positive_int(c, "global_head_dim")
    distant = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    each = [None]
    if isinstance(given, Mapping) and sorted(map(_layer_number, given)) == distant:
        each = list(given.values()) or [{}]
    if not all(isinstance(one, Mapping) and one.keys() <= set(PER_LAYER_KEYS) for one in each):
        raise ValueError(
            "config.json needs per_layer_config as an object with head_dim and, if they have other "
            "numbers of key/value heads, num_key_value_heads for every layer of full_attention and "
            f"for no other; given {c['per_layer_config']!r:.200}"
        )
    if any(one != each[0] for one in each):
        raise ValueError(
            "per_layer_config has other sizes for one layer of full_attention than for another, "
            f"which is not supported; given {c['per_layer_config']!r:.200}"
        )
    sizes = {**c, **each[0]}
    return positive_int(sizes, "num_key_value_heads"), positive_int(sizes, "head_dim")


def _layer_number(key: Any) -> int:
    """The number of a layer that a key of `per_layer_config` writes; -1 for none."""
    text = str(key)
    text = text.lstrip("0") or text[-1:]
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1


def fields(c: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` that Gemma 3 does not have.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for a setting that is not supported, or numbers that do not fit.
    """
    if c["use_bidirectional_attention"] not in (None, "vision"):
        raise ValueError(
            "use_bidirectional_attention = "
            f"{c['use_bidirectional_attention']!r:.80} is not supported; supported: null, 'vision'"
        )
    if layer_types[-1] != "full_attention":
        raise ValueError(
            f"the last of layer_types is {layer_types[-1]!r}; Gemma 4 needs 'full_attention' there"
        )
    heads, head_dim = global_sizes(c, layer_types)
    shared = _shared_layers(c, layer_types)
    width = c["hidden_size_per_layer_input"] or 0
    wide = bool(c["use_double_wide_mlp"]) and shared > 0
    return {
        "post_norms": True,
        "embed_scale": True,
        "qk_norm": True,
        "value_norm": True,
        "layer_scalar": True,
        # The norm of the queries has a weight that says how large they are.
        "attention_scale": 1.0,
        "global_layers": GlobalLayers(heads, head_dim, own_values=not c["attention_k_eq_v"]),
        "shared_kv_layers": shared,
        "shared_mlp_size": 2 * c["intermediate_size"] if wide else 0,
        "per_layer_size": positive_int(c, "hidden_size_per_layer_input") if width else 0,
        "per_layer_vocab_size": positive_int(c, "vocab_size_per_layer_input") if width else 0,
    }


def mixture(c: Mapping[str, Any]) -> Mixture | None:
    """The mixture of experts beside the MLPs (Gemma 4 26B-A4B); None for a model without.

    Raises:
      ValueError: for numbers that do not fit.
    """
    if not c["enable_moe_block"]:
        return None
    num_experts, chosen = positive_int(c, "num_experts"), positive_int(c, "top_k_experts")
    if chosen > num_experts:
        raise ValueError(
            f"config.json has top_k_experts = {chosen}, more than its {num_experts} experts"
        )
    size, other = c["moe_intermediate_size"], c["expert_intermediate_size"]
    if None not in (size, other) and size != other:
        raise ValueError(
            f"config.json has moe_intermediate_size = {size!r:.80} and expert_intermediate_size = "
            f"{other!r:.80}; the two mean the same"
        )
    size = positive_int({"moe_intermediate_size": size or other}, "moe_intermediate_size")
    return Mixture(num_experts, chosen, size, beside_mlp=True, block="")


def _shared_layers(c: Mapping[str, Any], layer_types: Sequence[str]) -> int:
    """How many layers at the end have no keys and values of their own."""
    shared = c["num_kv_shared_layers"]
    if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
        raise ValueError(
            f"config.json needs num_kv_shared_layers as an integer of at least 0; given "
            f"{shared!r:.80}"
        )
    own = set(layer_types[: max(len(layer_types) - shared, 0)])
    if own != set(layer_types):
        raise ValueError(
            f"num_kv_shared_layers = {shared} of {len(layer_types)} layers leaves no layer with "
            f"keys of its own for {', '.join(sorted(set(layer_types) - own))}"
        )
    return shared
