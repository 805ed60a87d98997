"""The reward functions that a config names."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from adpo_jax.rewards import RewardFunction


def reward_functions(config: ConfigDict) -> list[RewardFunction]:
    """The functions of `reward_functions`, or the single one that its short form names.

    The short form is verl's: custom_reward_function.path and name with reward_model.reward_kwargs.

    Raises:
      ValueError: for both at once, or an entry that is no function.
    """
    c = config.custom_reward_function
    short = {"path": c.path, "name": c.name, "kwargs": config.reward_model.reward_kwargs.to_dict()}
    if config.reward_functions and (short["path"] or short["kwargs"]):
        raise ValueError(
            "reward_functions takes the place of custom_reward_function.path and "
            "reward_model.reward_kwargs; give each function its own path and kwargs there"
        )
    if not config.reward_functions and not short["name"] and not short["path"]:
        return []
    return [_reward_function(entry) for entry in config.reward_functions or [short]]


def _reward_function(entry) -> RewardFunction:
    known = ("path", "name", "weight", "kwargs")
    entry = dict(entry) if isinstance(entry, Mapping | ConfigDict) else entry
    if not isinstance(entry, dict) or "name" not in entry or entry.keys() - {*known}:
        raise ValueError(
            'reward_functions: wanted dicts with "name" and, where needed, "path", "weight" '
            f'and "kwargs"; given {str(entry)[:200]!r}'
        )
    return RewardFunction(
        path=entry.get("path") or None,
        name=entry["name"],
        weight=entry.get("weight", 1.0),
        kwargs=dict(entry.get("kwargs") or {}),
    )
