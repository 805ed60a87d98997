"""Hugging Face `config.json` -> `ModelConfig`; reads what transformers 4 and 5 write."""

from collections.abc import Mapping
from typing import Any

from adpo_jax.hf import families, keys
from adpo_jax.hf.mixtures import mixture
from adpo_jax.hf.ropes import check_no_rope_layers, ropes
from adpo_jax.hf.values import cure, is_number, positive, positive_int, wrong
from adpo_jax.model.model_config import Mixture, ModelConfig

WIDTHS = ("hidden_size", "num_attention_heads", "intermediate_size")


def language_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, as a new dict.

    The types of `WRAPPERS` hold a language model beside a vision tower; for them `text_config` is
    returned. Every other config is returned as it is, with `architectures` filled in.

    Raises:
      ValueError: for an unsupported `model_type` or architecture.
    """
    model_type = hf_config.get("model_type")
    if model_type not in families.SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type {model_type!r:.80} is not supported; supported: "
            + ", ".join(families.SUPPORTED_MODEL_TYPES)
        )
    wrapper = families.WRAPPERS.get(model_type)
    config = _text_config(hf_config) if wrapper else dict(hf_config)
    architecture = families.FAMILIES[config["model_type"]].architecture
    wanted = wrapper.architecture if wrapper else architecture
    given = hf_config.get("architectures") or [wanted]
    if given not in ([wanted], (wanted,)):
        raise ValueError(
            f"architectures {given!r:.200} of model_type {model_type!r} is not supported; "
            f"supported: {wanted}"
        )
    config["architectures"] = [architecture]
    _check_quantization(config, families.FAMILIES[config["model_type"]])
    return config


def _check_quantization(config: Mapping[str, Any], family: families.Family) -> None:
    """Refuses weights in a form that is not read."""
    given = config.get("quantization_config")
    if not given or not family.quantized:
        return
    if not isinstance(given, Mapping):
        raise wrong(config, "quantization_config", "an object, or null")
    method = given.get("quant_method")
    if method != family.quantized:
        raise ValueError(
            f"quantization_config with quant_method = {method!r:.80} is not supported; supported: "
            f"{family.quantized!r}"
        )
    known = {"quant_method", "modules_to_not_convert", "dequantize"}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(
            "quantization_config has settings that are not implemented: "
            + ", ".join(f"{key[:80]} = {given[key]!r:.80}" for key in unknown[:8])
        )


def _text_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    wrapper = families.WRAPPERS[hf_config["model_type"]]
    if not isinstance(hf_config.get("text_config") or {}, Mapping):
        raise wrong(hf_config, "text_config", "an object")
    config = dict(hf_config.get("text_config") or {})
    text_type = config.setdefault("model_type", wrapper.text_types[0])
    if text_type not in wrapper.text_types:
        raise ValueError(
            f"model_type {text_type!r:.80} in text_config of {hf_config['model_type']} is not "
            f"supported; supported: {', '.join(wrapper.text_types)}"
        )
    # transformers reads the outer settings; token ids and dtype stand outside too.
    ties = hf_config.get("tie_word_embeddings", wrapper.ties)
    if ties is not None:
        config["tie_word_embeddings"] = ties
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"):
        if hf_config.get(key) is not None:
            config[key] = hf_config[key]
    return config


def check_counts(content: Any, path: str = "config.json") -> None:
    """Refuses counts from which transformers would make lists that no memory holds.

    Its tokenizers read config.json too, and make a list of one entry for each layer or label.

    Raises:
      ValueError: naming the key.
    """
    for key, value in content.items() if isinstance(content, Mapping) else ():
        check_counts(value, path)
        most = min(keys.LARGEST.get(key, keys.MOST_OF_ANY), keys.MOST_OF_ANY)
        counts = key.startswith(("num_", "n_")) or key.endswith("_layers")
        if counts and isinstance(value, int | float) and not value <= most:
            raise ValueError(f"{path} has {key[:80]} = {value!r:.80}, more than any machine holds")


def model_config(hf_config: Mapping[str, Any], max_length: int | None = None) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
      hf_config: as returned by `language_config`.
      max_length: tokens of the longest sequence that the model will see, which decides between the
        two sets of frequencies of LongRoPE; None for `max_position_embeddings`.

    Raises:
      ValueError: for a setting that is missing, unknown or not supported, by name.
    """
    family = families.FAMILIES[hf_config["model_type"]]
    _refuse_unknown(hf_config, family)
    c = {**family.defaults, **hf_config}
    if c["rope_scaling"] and "rope_parameters" not in hf_config:
        c["rope_parameters"] = None  # the family's own are for files without either
    _check_types(c)
    sizes = {key: positive_int(c, key) for key in keys.SIZES}
    for key in keys.PERIODS:
        if key in family.defaults:
            positive_int(c, key)
    heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
    if c["num_key_value_heads"] is None:
        c["num_key_value_heads"] = heads
    if c.get("head_dim") is None:
        c["head_dim"] = sizes["hidden_size"] // heads
    head_dim = positive_int(c, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")

    experts = mixture(hf_config["model_type"], c)
    _check_total(sizes, head_dim, positive_int(c, "num_key_value_heads"), experts)
    check_no_rope_layers(c, layers)
    layer_types = _layer_types(family, c, layers)
    distinct_ropes, layer_ropes = ropes(family, c, layer_types, max_length)
    bias = bool(c.get("attention_bias"))
    if "query_pre_attn_scalar" in family.defaults:
        scale = positive(c, "query_pre_attn_scalar") ** -0.5
    else:
        scale = head_dim**-0.5
    act = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    fields = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": positive_int(c, "num_key_value_heads"),
        "head_dim": head_dim,
        "windows": _windows(c, layer_types),
        "ropes": distinct_ropes,
        "layer_ropes": layer_ropes,
        "attention_scale": scale,
        "activation": _activation(c[act]),
        "norm_eps": c["rms_norm_eps"],
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias")),
        "attention_soft_cap": c.get("attn_logit_softcapping"),
        "logit_soft_cap": c.get("final_logit_softcapping"),
        "tie_embeddings": bool(c["tie_word_embeddings"]),
        "initializer_range": c["initializer_range"],
        "mixture": experts,
    }
    if family.fields:
        fields |= family.fields(c, layer_types)
    return ModelConfig(**{**fields, **family.traits(c)})


def _refuse_unknown(hf_config: Mapping[str, Any], family: families.Family) -> None:
    read = family.defaults.keys() - families.COMMON.keys() | family.passed_over
    for key, only in keys.ONLY_VALUE.items():
        if key not in read and hf_config.get(key) not in (None, only):
            raise ValueError(
                f"{key} = {hf_config[key]!r:.80} is not supported; supported: {only!r}"
            )
    known = keys.SIZES | keys.HARMLESS | keys.GENERATION | keys.ONLY_VALUE.keys()
    known |= family.defaults.keys()
    # A switch that is off changes nothing. Names with "_" in front are transformers' own notes.
    unknown = sorted(
        key
        for key, value in hf_config.items()
        if value and key not in known and not key.startswith("_")
    )
    if unknown:
        raise ValueError(
            f"config.json of a {hf_config['model_type']} model has settings that are not "
            "implemented and may change the model: "
            + ", ".join(f"{key[:80]} = {hf_config[key]!r:.80}" for key in unknown[:16])
            + (f" and {len(unknown) - 16} more" if len(unknown) > 16 else "")
            + f". {cure({unknown[0][:80]: None})}"
        )


def _check_types(c: Mapping[str, Any]) -> None:
    """Refuses values that no model of the family can have, before they are computed with."""

    wanted = [
        *((key, "a number above 0", is_number) for key in keys.NUMBERS),
        *((key, "a number above 0, or null", lambda v: v is None or is_number(v))
          for key in keys.NUMBERS_OR_NULL),
        *((key, "a number of at least 0", lambda v: v == 0 or is_number(v)) for key in keys.COUNTS),
        *((key, "true or false", lambda v: v is None or isinstance(v, bool))
          for key in keys.SWITCHES),
        *((key, "true, false or a number", lambda v: v is None or isinstance(v, bool | int | float))
          for key in keys.SWITCHES_OR_NUMBERS),
        *((key, "an object, or null", lambda v: v is None or isinstance(v, Mapping))
          for key in keys.OBJECTS_OR_NULL),
        ("layer_types", "a list of text, or null", lambda v: v is None or _is_list_of_text(v)),
    ]  # fmt: skip
    for key, what, holds in wanted:
        if key in c and not holds(c[key]):
            raise wrong(c, key, what)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)


def _check_total(
    sizes: Mapping[str, int], head_dim: int, kv_heads: int, experts: Mixture | None
) -> None:
    D, heads, F = (sizes[key] for key in WIDTHS)
    if experts:
        F = max(F, experts.num_experts * experts.expert_size + experts.shared_size)
    layer = D * (2 * (heads + kv_heads) * head_dim + 3 * F)
    total = D * sizes["vocab_size"] + sizes["num_hidden_layers"] * layer
    if total > keys.MOST_PARAMETERS:
        raise ValueError(
            f"config.json describes a model of {total:,} parameters, which no machine holds"
        )


def _activation(name: str) -> str:
    if not isinstance(name, str) or name not in keys.ACTIVATION_NAMES:
        raise ValueError(
            f"activation {name!r:.80} is not supported; supported: "
            + ", ".join(keys.ACTIVATION_NAMES)
        )
    return keys.ACTIVATION_NAMES[name]


# --- which layers see how far


def _layer_types(family: families.Family, c: Mapping[str, Any], num_layers: int) -> list[str]:
    if c.get("layer_types") is not None:
        layer_types = list(c["layer_types"])
    else:
        layer_types = [family.kinds[bool(family.is_second_kind(c, i))] for i in range(num_layers)]

    unknown = sorted(set(layer_types) - set(family.kinds))
    if unknown:
        raise ValueError(
            f"layer types {unknown!r:.200} are not supported; supported: {', '.join(family.kinds)}"
        )
    if len(layer_types) != num_layers:
        raise ValueError(f"{len(layer_types)} layer_types for num_hidden_layers = {num_layers}")
    return layer_types


def _windows(c: Mapping[str, Any], layer_types: list[str]) -> tuple[int | None, ...]:
    if "sliding_attention" not in layer_types:
        return (None,) * len(layer_types)
    if not c.get("use_sliding_window", True):
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is false")
    window = positive_int(c, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
