"""The identity of a run: its config and the contents of its files, and what of them may change.

Two parts of one run may differ in a learning rate or a log. They may not differ in the model, the
data, the seed or the algorithm, unless the user says so.
"""

import contextlib
import functools
import json
import operator
from pathlib import Path

from ml_collections import ConfigDict

from adpo_jax.config import declarations, default_config
from adpo_jax.log.redaction import is_redaction_of, redacted
from adpo_jax.losses import ALGORITHMS, parameters
from adpo_jax.run.config_checks import fill_in

# The keys that may differ between two parts of one run; all others say what the run is. A name that
# ends in a dot stands for all keys below it.
MAY_CHANGE = (
    "mesh.",
    "actor_rollout_ref.actor.attention",
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.actor.optim.betas",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.actor.optim.lr_scheduler_type",
    "actor_rollout_ref.actor.optim.lr_warmup_steps",
    "actor_rollout_ref.actor.optim.min_lr_ratio",
    "actor_rollout_ref.actor.optim.weight_decay",
    "actor_rollout_ref.actor.optimizer_offload",
    "actor_rollout_ref.actor.sequence_exchange",
    "actor_rollout_ref.rollout.attention",
    "actor_rollout_ref.rollout.expected_response_length",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.num_slots",
    "actor_rollout_ref.rollout.prefill_chunk_size",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "anchor.offload",
    "custom_reward_function.num_workers",
    "custom_reward_function.on_timeout",
    "custom_reward_function.timeout_s",
    "data.cache_dir",
    "environment.num_workers",
    "environment.rollout_timeout_s",
    "environment.serve_host",
    "environment.timeout_s",
    "environment.url",
    "eval.",
    "sft.save_freq",
    "trainer.best_metric",
    "trainer.compilation_cache_dir",
    "trainer.experiment_name",
    "trainer.grace_period_s",
    "trainer.gradient_checkpointing",
    "trainer.log_num_samples",
    "trainer.log_samples_freq",
    "trainer.logger",
    "trainer.max_anchor_kl",
    "trainer.max_bad_updates",
    "trainer.max_save_failures",
    "trainer.on_bad_update",
    "trainer.per_device_train_batch_size",
    "trainer.profile_steps",
    "trainer.project_name",
    "trainer.rollout_data_dir",
    "trainer.save_freq",
    "trainer.save_total_limit",
    "trainer.scan_layers",
    "trainer.test_freq",
    "trainer.total_epochs",
    "trainer.total_training_steps",
    "trainer.val_before_train",
)

# Of these, the keys that may get another value, and may not begin or cease to have one: without its
# environment a run gets other rewards.
MAY_MOVE = ("environment.url",)

# The key of the digests in config.json, a dict of texts.
CONTENTS = "contents"
# The key of the folder that relative paths of the config start from; no part of the identity.
WORKING_DIRECTORY = "working_directory"
# The digest that says what adapters a run began with that came from a folder, as JSON.
ADAPTERS = "adapters"


def as_json(config: ConfigDict, replay: Path | None, contents: dict | None) -> dict:
    """The identity of a run as it is written to config.json, without secrets.

    Args:
      replay: the recording that it trains from; None for none.
      contents: digests of the contents of its files; None where they are not known.

    Raises:
      ValueError: for a value that JSON has no form for, such as a set.
    """
    try:
        text = config.to_json()
    except TypeError:
        keys = ", ".join(key for key in declarations() if not _has_json(config, key))
        raise ValueError(
            f"{keys} cannot be written to config.json. Values are numbers, texts, booleans, None, "
            "and lists, tuples and dicts of these"
        ) from None
    content = redacted(json.loads(text))
    content["replay"] = str(Path(replay).resolve()) if replay else ""
    return content if contents is None else content | {CONTENTS: contents}


def _has_json(config: ConfigDict, key: str) -> bool:
    try:
        ConfigDict({"value": functools.reduce(operator.getitem, key.split("."), config)}).to_json()
    except TypeError:
        return False
    return True


def digests_in(saved: dict) -> dict:
    """The digests in a saved identity; none where it is older, or edited."""
    found = saved.get(CONTENTS)
    return found if isinstance(found, dict) else {}


def refused(there: dict, here: dict, step: int, has_checkpoint: bool) -> list[str]:
    """The lines of `changes` with which a run may not go on.

    Args:
      step: iterations done in the newest checkpoint, below 0 in a cold start; 0 without one.
    """
    return [
        line
        for key, line in changes(there, here).items()
        if not _may_change(key, step, has_checkpoint)
        or (key in MAY_MOVE and _is_set(there, key) != _is_set(here, key))
    ]


def _may_change(key: str, step: int, has_checkpoint: bool) -> bool:
    """Whether a run may go on under another value of a key; arguments as for `refused`."""
    if key == f"{CONTENTS}.{ADAPTERS}":
        return not has_checkpoint  # every checkpoint has adapters that were trained under these
    if key.startswith(f"{CONTENTS}."):
        # Files that have not been used yet, or never will be again, have no part in the state.
        return step >= 0 if key == f"{CONTENTS}.demonstrations" else step <= 0
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)


def _is_set(identity: dict, key: str) -> bool:
    """Whether an identity, maybe of an earlier version, has a value of a key that is not empty."""
    section, _, name = key.partition(".")
    values = identity.get(section)
    return isinstance(values, dict) and bool(values.get(name))


def changes(there: dict, here: dict) -> dict[str, str]:
    """The keys whose values differ: key -> a line with both values.

    Args:
      there: an identity that `as_json` wrote, maybe in an earlier version.
      here: the present identity.
    """
    # A run that is older than a key is taken to have its present default, as the other keys of the
    # run derive it; one that is older than the digests, the present contents.
    there = _filled(redacted(there), json.loads(default_config().to_json()) | {"replay": ""})
    with contextlib.suppress(TypeError):  # a section that was edited into none shows below
        fill_in(there)
    known, now = digests_in(there), here.get(CONTENTS, {})
    for name in (CONTENTS, WORKING_DIRECTORY):
        there.pop(name, None)
    shared = {name: known.get(name, value) for name, value in now.items()}
    lines = _differences(there | {CONTENTS: shared}, {CONTENTS: {}} | here)
    prompts = f"{CONTENTS}.train_prompts"
    if "of files" in lines.get(prompts, "") and lines[prompts].count("of files") == 1:
        lines[prompts] += (
            " (the digest of a large data set was that of its tokens and is that of its files now; "
            "where the data is the same, --allow_config_change is safe)"
        )
    without_effect = _parameters_of_others(here["algorithm"]["adv_estimator"])
    return {key: line for key, line in lines.items() if key not in without_effect}


def _parameters_of_others(name: str) -> set[str]:
    """The keys of the parameters that the algorithm of this name does not have.

    They have their defaults, which a version with other algorithms may have changed.
    """
    own = ALGORITHMS[name].__dataclass_fields__
    union = parameters.union(ALGORITHMS.values())
    return {f"algorithm.{p.name}" for p in union if p.name not in own}


def _filled(there: dict, defaults: dict) -> dict:
    """`there` with the defaults of the keys that it lacks."""
    filled = defaults | there
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(there.get(key), dict):
            filled[key] = _filled(there[key], default) if default else there[key]
    return filled


def _differences(there: dict, here: dict, prefix: str = "") -> dict[str, str]:
    """The keys whose values differ, each with a line that shows both."""
    lines = {}
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines |= _differences(old, new, f"{prefix}{key}.")
        elif old != new and not is_redaction_of(old, new):
            lines[f"{prefix}{key}"] = f"{prefix}{key}: {old!r} -> {new!r}"
    return lines
