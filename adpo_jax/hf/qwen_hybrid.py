"""What a `config.json` of Qwen3-Next or Qwen3.5 says besides that of Qwen3: linear attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from adpo_jax.hf.values import positive_int
from adpo_jax.model.linear_attention import CHUNK
from adpo_jax.model.model_config import LinearAttention


def fields(c: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` that Qwen3 does not have.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for a setting that is not supported, or numbers that do not fit.
    """
    if c["attention_bias"]:
        raise ValueError("attention_bias = True is not supported; supported: False")
    if not c.get("attn_output_gate", True):
        raise ValueError("attn_output_gate = False is not supported; supported: True")
    if c.get("mamba_ssm_dtype") not in (None, "float32"):
        raise ValueError(
            f"mamba_ssm_dtype = {c['mamba_ssm_dtype']!r:.80} is not supported; supported: "
            "'float32', the dtype of the state"
        )
    key_heads, value_heads = (
        positive_int(c, f"linear_num_{kind}_heads") for kind in ("key", "value")
    )
    if value_heads % key_heads:
        raise ValueError(
            f"config.json has linear_num_value_heads = {value_heads}, which is not a multiple of "
            f"linear_num_key_heads = {key_heads}"
        )
    if "full_attention" not in layer_types:
        raise ValueError(
            "layer_types has no layer of full_attention, and a model of linear attention alone is "
            "not supported"
        )
    taps = positive_int(c, "linear_conv_kernel_dim")
    if taps > CHUNK // 4:
        raise ValueError(
            f"linear_conv_kernel_dim = {taps} is not supported; supported: 1 to {CHUNK // 4}"
        )
    linear = LinearAttention(
        layers=tuple(kind == "linear_attention" for kind in layer_types),
        num_key_heads=key_heads,
        key_dim=positive_int(c, "linear_key_head_dim"),
        num_value_heads=value_heads,
        value_dim=positive_int(c, "linear_value_head_dim"),
        taps=taps,
        by_key_head=c["model_type"] == "qwen3_next",
    )
    return {
        "norm_plus_one": True,
        "qk_norm": True,
        "gated_attention": True,
        # A model may be made of its full attention alone.
        "linear_attention": linear if any(linear.layers) else None,
    }
