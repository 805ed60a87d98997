"""The mixture of experts that a `config.json` describes."""

from collections.abc import Callable, Mapping
from typing import Any

from adpo_jax.hf.families import NUM_EXPERTS
from adpo_jax.model.model_config import Mixture

# Reads a key of the config as a positive integer, as `config.model_config` does.
Count = Callable[[Mapping[str, Any], str], int]


def mixture(model_type: str, c: Mapping[str, Any], count: Count) -> Mixture | None:
    """The mixture of a model; None for a family without one.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for a setting that is not supported, or numbers that do not fit.
    """
    if model_type not in NUM_EXPERTS:
        return None
    num_experts = count({"num_experts": _num_experts(model_type, c)}, "num_experts")
    chosen = count(c, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {chosen}, more than its {num_experts} experts"
        )
    _refuse_layers_without(c)
    if model_type == "mixtral":
        return Mixture(num_experts, chosen, count(c, "intermediate_size"), block="block_sparse_moe")
    own_size = "moe_intermediate_size" if "moe_intermediate_size" in c else "intermediate_size"
    shared = model_type == "qwen2_moe"
    return Mixture(
        num_experts,
        chosen,
        count(c, own_size),
        normalised=bool(c["norm_topk_prob"]),
        shared_size=count(c, "shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )


def _num_experts(model_type: str, c: Mapping[str, Any]) -> Any:
    """The number of experts, which transformers writes under two names."""
    given = [c[key] for key in ("num_experts", "num_local_experts") if c[key] is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            f"config.json has num_experts = {given[0]!r:.80} and num_local_experts = "
            f"{given[1]!r:.80}; the two mean the same"
        )
    return given[0] if given else NUM_EXPERTS[model_type]


def _refuse_layers_without(c: Mapping[str, Any]) -> None:
    """Refuses an MLP in place of the mixture in some of the layers."""
    if c.get("mlp_only_layers"):
        raise ValueError(
            f"mlp_only_layers = {c['mlp_only_layers']!r:.80} is not supported; supported: []"
        )
    if c.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"decoder_sparse_step = {c['decoder_sparse_step']!r:.80} is not supported; supported: 1"
        )
