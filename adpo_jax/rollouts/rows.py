"""What environments are told of a row of the data: its columns, and a seed."""

import hashlib

import jax
import numpy as np

from adpo_jax.environments.contract import COLUMN
from adpo_jax.records import Prompts


def rows_of(prompts: Prompts) -> list[dict]:
    """The rows of the data that prompts were made of."""
    return [
        {name: values[place] for name, values in prompts.columns.items()}
        for place in range(len(prompts))
    ]


def reset_row(row: dict, prompt_key: str, name: str | None) -> dict:
    """What `reset` is given of a row; its prompt is also there under TRL's name, "prompt"."""
    given = {key: value for key, value in row.items() if name is None or key != COLUMN}
    return ({"prompt": row[prompt_key]} if prompt_key in row else {}) | given


def group_seeds(key: jax.Array, prompts: Prompts) -> list[int]:
    """The seed of each group's environments, made of the key, the prompt and its copy number."""
    of_key = np.asarray(jax.random.key_data(key)).tobytes()
    seeds = []
    for ids, copy in zip(prompts.token_ids, prompts.copy_numbers, strict=True):
        content = np.array(ids, np.int64).tobytes()
        digest = hashlib.sha256(of_key + content + copy.to_bytes(8, "big")).digest()
        seeds.append(int.from_bytes(digest[:7], "big"))
    return seeds
