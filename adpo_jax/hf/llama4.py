"""What a `config.json` of Llama 4 says besides that of Llama."""

from collections.abc import Mapping, Sequence
from typing import Any

from adpo_jax.hf.values import positive_int
from adpo_jax.model.model_config import Mixture


def fields(c: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` that Llama does not have.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for numbers that do not fit.
    """
    mixtures = _mixture_layers(c)
    chunked = "chunked_attention" in layer_types
    chunk = positive_int(c, "attention_chunk_size") if chunked else None
    chunks = tuple(chunk if kind == "chunked_attention" else None for kind in layer_types)
    return {
        "intermediate_size": positive_int(c, "intermediate_size_mlp"),
        "chunks": chunks if chunked else (),
        "qk_unit_norm": bool(c["use_qk_norm"]),
        "rope_interleaved": True,
        "mlp_module": "feed_forward",
        "mlp_layers": tuple(i for i in range(len(layer_types)) if mixtures and i not in mixtures),
    }


def mixture(c: Mapping[str, Any]) -> Mixture | None:
    """The mixture of experts of some layers or all (Scout, Maverick); None for a model without.

    Raises:
      ValueError: for numbers that do not fit.
    """
    if not _mixture_layers(c):
        return None
    num_experts = positive_int(c, "num_local_experts")
    chosen = positive_int(c, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {chosen}, more than its {num_experts} experts"
        )
    size = positive_int(c, "intermediate_size")
    return Mixture(
        num_experts,
        chosen,
        size,
        router="sigmoid_of_inputs",
        normalised=False,
        shared_size=size,
        block="feed_forward",
    )


def _mixture_layers(c: Mapping[str, Any]) -> Sequence[int]:
    """The layers that have a mixture; every nth one where the file does not list them."""
    layers, listed = positive_int(c, "num_hidden_layers"), c["moe_layers"]
    if listed is None:
        step = positive_int(c, "interleave_moe_layer_step")
        return range(step - 1, layers, step)
    if not isinstance(listed, list | tuple) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers for i in listed
    ):
        raise ValueError(
            f"config.json needs moe_layers as a list of numbers of its {layers} layers, from 0, or "
            f"null; given {listed!r:.80}"
        )
    return sorted(set(listed))
