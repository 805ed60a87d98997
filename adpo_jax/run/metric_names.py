"""The names of metrics, except those that an algorithm declares itself.

docs/metrics.md explains each. `*` stands for any text.
"""

from collections.abc import Iterable

NAMES = {
    "anchor": "renewed",
    "reward": "mean std group_std unparsed_frac timeouts crashes grader_faults *",
    "groups": "zero_std_frac all_right_frac all_wrong_frac silence_preferred_frac",
    "rollout": (
        "length_mean length_max truncated_frac masked_frac tokens_per_s unique_frac entropy "
        "mismatch_kl mismatch_ratio_max preempted turns"
    ),
    "tools": "calls failures seconds",
    "filter": "attempts dropped_frac fillers carried sampled_reward",
    "ahead": "staleness_mean staleness_max in_flight carried_tokens idle_frac waited lag_*_frac",
    "samplers": "connected taken_back doubles",
    "router": "busiest idle_frac balance_loss replay_changed_frac",
    "update": (
        "grad_norm lr tokens kept_tokens kept_prompts tokens_per_s padding_frac compiles "
        "load_imbalance skipped mfu hfu"
    ),
    "time": "rollout reward anchor update eval checkpoint",
    "memory": "host_gib device_in_use_gib device_peak_gib",
    "checkpoint": "failures",
    "tracker": "failures",
}


def of_rows(
    of_algorithm: Iterable[str],
    *,
    filtered: bool,
    ahead: bool,
    evaluated: bool,
    num_samples: int,
    ks: tuple[int, ...],
    by_category: bool,
    in_pages: bool = False,
    in_turns: bool = False,
    tools: bool = False,
    mixture: bool = False,
) -> list[str]:
    """All names that the rows of a run's iterations may have.

    Args:
      of_algorithm: the names of the metrics of its algorithm.
      filtered: whether groups are filtered.
      ahead: whether groups are sampled ahead of the update.
      evaluated: whether there is data to evaluate on.
      num_samples, ks: sampled answers of the evaluation, and the k of its pass@k and maj@k.
      by_category: whether its scores are broken down by category.
      in_pages: whether memory is planned for completions of expected length.
      in_turns: whether there is an environment.
      tools: whether its tools are known to the run.
      mixture: whether the model may be a mixture of experts.
    """
    left_out = {"filter": not filtered, "ahead": not ahead, "tools": not tools}
    left_out["samplers"] = not ahead  # the config alone does not say
    left_out["router"] = not mixture
    groups = [group for group in NAMES if not left_out.get(group)]
    names = [*of_algorithm, *(f"{g}/{name}" for g in groups for name in NAMES[g].split())]
    if not in_pages:
        names.remove("rollout/preempted")
    if not in_turns:
        names.remove("rollout/turns")
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
