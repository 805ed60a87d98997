"""The mixture of experts that a `config.json` describes."""

from collections.abc import Mapping
from typing import Any

from adpo_jax.hf import gemma4, llama4
from adpo_jax.hf.families import FAMILIES
from adpo_jax.hf.values import positive_int
from adpo_jax.model.model_config import Mixture


def mixture(model_type: str, c: Mapping[str, Any]) -> Mixture | None:
    """The mixture of a model; None for a family without one.

    Args:
      c: the config with the family's defaults.

    Raises:
      ValueError: for a setting that is not supported, or numbers that do not fit.
    """
    if model_type == "gemma4_text":
        return gemma4.mixture(c)
    if model_type == "llama4_text":
        return llama4.mixture(c)
    if not FAMILIES[model_type].num_experts:
        return None
    num_experts = positive_int({"num_experts": _num_experts(model_type, c)}, "num_experts")
    chosen = positive_int(c, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {chosen}, more than its {num_experts} experts"
        )
    _refuse_layers_without(c)
    if model_type == "gpt_oss":
        return _gpt_oss(c, num_experts, chosen)
    if model_type == "glm4_moe":
        return _glm4_moe(c, num_experts, chosen)
    if model_type == "mixtral":
        return Mixture(
            num_experts, chosen, positive_int(c, "intermediate_size"), block="block_sparse_moe"
        )
    own_size = "moe_intermediate_size" if "moe_intermediate_size" in c else "intermediate_size"
    shared = model_type in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")
    if model_type == "qwen3_5_moe_text" and not c["norm_topk_prob"]:
        raise ValueError("norm_topk_prob = False is not supported; supported: True")
    return Mixture(
        num_experts,
        chosen,
        positive_int(c, own_size),
        normalised=bool(c["norm_topk_prob"]),
        shared_size=positive_int(c, "shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )


def _gpt_oss(c: Mapping[str, Any], num_experts: int, chosen: int) -> Mixture:
    again = c["experts_per_token"]
    if again is not None and again != chosen:
        raise ValueError(
            f"config.json has num_experts_per_tok = {chosen} and experts_per_token = "
            f"{again!r:.80}; the two mean the same"
        )
    return Mixture(
        num_experts,
        chosen,
        positive_int(c, "intermediate_size"),
        router="softmax_of_chosen",
        biases=True,
        alternating=True,
    )


def _glm4_moe(c: Mapping[str, Any], num_experts: int, chosen: int) -> Mixture:
    first, layers = c["first_k_dense_replace"], positive_int(c, "num_hidden_layers")
    if not isinstance(first, int) or first >= layers:
        raise ValueError(
            f"config.json needs first_k_dense_replace as an integer below its {layers} layers; "
            f"given {first!r:.80}"
        )
    groups = positive_int(c, "n_group")
    if groups > 1 and num_experts < 2 * groups:
        raise ValueError(
            f"config.json has n_group = {groups} for {num_experts} experts; a group is chosen by "
            "its two best experts, so it needs two"
        )
    size = positive_int(c, "moe_intermediate_size")
    return Mixture(
        num_experts,
        chosen,
        size,
        router="sigmoid",
        normalised=bool(c["norm_topk_prob"]),
        scale=float(c["routed_scaling_factor"]),
        groups=groups,
        chosen_groups=positive_int(c, "topk_group"),
        shared_size=positive_int(c, "n_shared_experts") * size,
    )


def _num_experts(model_type: str, c: Mapping[str, Any]) -> Any:
    """The number of experts, which transformers writes under several names."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    given = {key: c[key] for key in names if c.get(key) is not None}
    (key, value), *others = given.items() if given else [("", FAMILIES[model_type].num_experts)]
    for other, again in others:
        if again != value:
            raise ValueError(
                f"config.json has {key} = {value!r:.80} and {other} = {again!r:.80}; the two "
                "mean the same"
            )
    return value


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
