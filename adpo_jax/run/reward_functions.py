"""The reward functions that a config names."""

import difflib
import numbers
from collections.abc import Mapping

from ml_collections import ConfigDict

from adpo_jax.rewards import RewardFunction

# What an entry may have: in words, and the types.
_FIELDS = {
    "path": ("text, the path of a Python file", (str, type(None))),
    "name": ("text, the name of a function", (str,)),
    "weight": ("a number", (numbers.Real,)),
    "kwargs": ("a dict", (Mapping, ConfigDict, type(None))),
}


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
    if not config.reward_functions:
        return [_reward_function(short, "custom_reward_function")]
    return [
        _reward_function(entry, f"reward_functions[{i}]")
        for i, entry in enumerate(config.reward_functions)
    ]


def _reward_function(entry, where: str) -> RewardFunction:
    """One function; `where` is what the user calls its entry.

    Raises:
      ValueError: naming the field that is wrong.
    """
    entry = dict(entry) if isinstance(entry, Mapping | ConfigDict) else entry
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(
            'reward_functions: wanted dicts with "name" and, where needed, "path", "weight" and '
            f'"kwargs"; given {str(entry)[:200]!r} as {where}'
        )
    for key, value in entry.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has the key {key!r}, and takes {', '.join(_FIELDS)}{hint}")
        wanted, kinds = _FIELDS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}.{key} is {wanted}; given {value!r:.100}")
    if not entry["name"]:
        raise ValueError(f'{where}.name is empty; name a function, such as "good_accuracy"')
    return RewardFunction(
        path=entry.get("path") or None,
        name=entry["name"],
        weight=entry.get("weight", 1.0),
        kwargs=dict(entry.get("kwargs") or {}),
    )
