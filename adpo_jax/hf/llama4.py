"""What a `config.json` of Llama 4 says besides that of Llama, of models without experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Reads a key of the config as a positive integer, as `config.model_config` does.
Count = Callable[[Mapping[str, Any], str], int]


def fields(c: Mapping[str, Any], layer_types: Sequence[str], count: Count) -> dict[str, Any]:
    """The fields of `ModelConfig` that Llama does not have.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for a mixture of experts, or numbers that do not fit.
    """
    _refuse_mixture(c, len(layer_types), count)
    chunked = "chunked_attention" in layer_types
    chunk = count(c, "attention_chunk_size") if chunked else None
    chunks = tuple(chunk if kind == "chunked_attention" else None for kind in layer_types)
    return {
        "intermediate_size": count(c, "intermediate_size_mlp"),
        "chunks": chunks if chunked else (),
        "qk_unit_norm": bool(c["use_qk_norm"]),
        "rope_interleaved": True,
        "mlp_module": "feed_forward",
    }


def _refuse_mixture(c: Mapping[str, Any], num_layers: int, count: Count) -> None:
    """Refuses a mixture of experts in any layer; without `moe_layers` every nth layer has one."""
    listed, key = c["moe_layers"], "moe_layers"
    if listed is None:
        key = "interleave_moe_layer_step"
        step = count(c, key)
        listed = range(step - 1, num_layers, step)
    if listed:
        raise ValueError(
            f"{key} = {c[key]!r:.80} of llama4_text asks for a mixture of experts, as Scout and "
            "Maverick have it, which is not implemented; supported: moe_layers = []"
        )
