"""Values of a `config.json`, read as what they must be."""

import json
from collections.abc import Mapping
from typing import Any

from adpo_jax.hf.keys import LARGEST


def positive_int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json needs {key} as a positive integer; given {value!r:.80}")
    if value > LARGEST.get(key, value):
        raise ValueError(
            f"config.json has {key} = {value:,}, more than any machine holds; at most "
            f"{LARGEST[key]:,} is read"
        )
    return value


def positive(config: Mapping[str, Any], key: str) -> float:
    if not config[key] > 0:
        raise wrong(config, key, "a number above 0")
    return config[key]


def is_number(value: Any) -> bool:
    """Whether it is a number above 0 that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def cure(override: Mapping[str, Any]) -> str:
    """What to do about settings that are not implemented.

    Args:
      override: one that passes such a setting over.
    """
    return (
        "Those that do not change the model can be taken out of its config.json, or passed over by "
        "a null in actor_rollout_ref.model.override_config (for the policy of a run or of "
        "adpo-jax evaluate; actor_rollout_ref.ref and teacher have their own), as in "
        f"{override}, or in --override-config of adpo-jax export, generate and serve, as in "
        f"{json.dumps(override)}"
    )


def wrong(config: Mapping[str, Any], key: str, wanted: str) -> ValueError:
    """The error of a key that holds something else than what is wanted."""
    given = "null" if config[key] is None else f"{config[key]!r:.80}"
    return ValueError(f"config.json needs {key} as {wanted}; given {given}")
