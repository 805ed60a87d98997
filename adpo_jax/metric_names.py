"""The names of metrics; docs/metrics.md says what each is. `*` stands for any text."""

_OF_EVERY_LOSS = "loss anchor_kl abs_log_ratio kl_penalty dropped_prompts zero_std_frac"

NAMES = {
    "adpo": f"{_OF_EVERY_LOSS} mean_tau target_entropy",
    "grpo": f"{_OF_EVERY_LOSS} clip_frac",
    "rloo": _OF_EVERY_LOSS,
    "anchor": "renewed",
    "reward": "mean std group_std unparsed_frac timeouts crashes *",
    "groups": "zero_std_frac all_right_frac all_wrong_frac",
    "rollout": (
        "length_mean length_max truncated_frac tokens_per_s unique_frac entropy mismatch_kl "
        "mismatch_ratio_max"
    ),
    "filter": "attempts dropped_frac fillers carried sampled_reward",
    "update": "grad_norm lr tokens tokens_per_s padding_frac skipped mfu hfu",
    "time": "rollout reward anchor update eval checkpoint",
    "memory": "host_gib device_in_use_gib device_peak_gib",
    "checkpoint": "failures",
    "tracker": "failures",
}


def of_rows(
    algorithm: str,
    *,
    filtered: bool,
    evaluated: bool,
    num_samples: int,
    ks: tuple[int, ...],
    by_category: bool,
) -> list[str]:
    """All names that the rows of a run's iterations may have.

    Args:
      algorithm: "adpo", "grpo" or "rloo".
      filtered: whether groups are filtered.
      evaluated: whether there is data to evaluate on.
      num_samples, ks: of the evaluation, besides the greedy answers.
      by_category: whether its scores are broken down.
    """
    others = {"adpo", "grpo", "rloo", "filter"} - {algorithm} - ({"filter"} if filtered else set())
    names = [f"{g}/{name}" for g in NAMES if g not in others for name in NAMES[g].split()]
    if not evaluated:
        return names
    scores = ["accuracy", "reward"]
    if num_samples:
        ks = ks or (num_samples,)
        scores += [f"mean@{num_samples}", *(f"{kind}@{k}" for k in ks for kind in ("pass", "maj"))]
    scores = [score + end for score in scores for end in ("", "_low", "_high")]
    names += [f"eval/{name}" for name in (*scores, "length_mean", "truncated_frac")]
    if by_category:
        names += [f"eval/*/{name}" for name in (*scores, "num_prompts")]
    return names
