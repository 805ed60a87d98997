"""Checks of the configuration, before anything else is done with it.

The declaration of a key (`config.Key`) says what that key alone allows and needs, and is checked
here. The other checks are about several keys together, and about the command line. Algorithms check
the bounds of their own parameters.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Collection
from pathlib import PurePath

from ml_collections import ConfigDict

from adpo_jax import losses
from adpo_jax.config import Key, declarations, default_config, keys
from adpo_jax.engine.sampling import LEAST_TEMPERATURE
from adpo_jax.run import metric_names, other_trainers
from adpo_jax.run.reward_functions import reward_functions
from adpo_jax.run.whole_keys import section, whole_keys

# How like a misspelt key another is that it is taken for: trainer.val_only is at 0.72 like
# trainer.seed, and algorithm.tauu at 0.97 like algorithm.tau.
_NEAR = 0.8
# Of whole numbers: what an int32 holds.
LARGEST = 2**31 - 1
# The names that a folder may have: one part of a path, and not hidden.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,-]*")


def finalized(config: ConfigDict) -> ConfigDict:
    """A validated and locked copy of the config, with derived defaults filled in."""
    config = ConfigDict(config).copy_and_resolve_references()
    with config.unlocked():
        other_trainers.taken_as_given(config)
        fill_in(config)
    validate(config)
    return config.lock()


def fill_in(config: ConfigDict | dict) -> None:
    """Sets the keys that are left unset and whose default depends on others, in place.

    Args:
      config: one that has every key, or the same as dicts.
    """
    actor, trainer = config["actor_rollout_ref"]["actor"], config["trainer"]
    actor["ppo_mini_batch_size"] = (
        actor["ppo_mini_batch_size"] or config["data"]["train_batch_size"]
    )
    remat = str(trainer["gradient_checkpointing"]).lower()
    spelled = {"true": "full", "false": "none"}
    trainer["gradient_checkpointing"] = spelled.get(remat, remat)
    _fill_in_defaults_of_the_algorithm(config)
    _fill_in_what_depends_on_other_keys(config)


def take_back_defaults(config: ConfigDict) -> None:
    """Leaves unset what `fill_in` would set to the value that is there, in place.

    So a value that was derived from another key does not outlive a change of that key.
    """
    final = _filled(config)
    for name, key in declarations().items():
        given = _value(config, name)
        if given == key.default:
            continue
        _set(config, name, key.default)
        if _filled(config) != final:
            _set(config, name, given)


def _filled(config: ConfigDict) -> ConfigDict:
    """A copy with all that `fill_in` sets."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        fill_in(config)
    return config


def _fill_in_defaults_of_the_algorithm(config: ConfigDict | dict) -> None:
    """Sets parameters that the config leaves unset, since their default differs by algorithm."""
    algorithm = config["algorithm"]
    kind = losses.ALGORITHMS.get(algorithm["adv_estimator"])
    for field in dataclasses.fields(kind) if kind else ():
        if algorithm[field.name] is None:
            algorithm[field.name] = field.default


def _fill_in_what_depends_on_other_keys(config: ConfigDict | dict) -> None:
    algorithm, rollout = config["algorithm"], config["actor_rollout_ref"]["rollout"]
    if algorithm["loss_aggregation"] == "constant" and algorithm["constant_length"] is None:
        algorithm["constant_length"] = config["data"]["max_response_length"]
    if algorithm["sampler_correction"] == "auto":
        computed = "bfloat16" if config["trainer"]["bf16"] else "float32"
        narrow = rollout["cache_dtype"] and rollout["cache_dtype"] not in (computed, "float32")
        on_policy = config["anchor"]["mode"] == "on_policy"
        differs = (narrow or rollout["max_staleness"]) and on_policy
        algorithm["sampler_correction"] = "truncate" if differs else "none"


def validate(config: ConfigDict) -> None:
    """Checks the values that keys allow and need, and what several keys together can get wrong.

    Raises:
      ValueError: naming the wanted values, the given one and the cure.
    """
    declared = declarations()
    if config.actor_rollout_ref.rollout.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature is at least {LEAST_TEMPERATURE}: training "
            "samples, and greedy completions of a prompt are all the same. Evaluation is greedy by "
            "itself"
        )
    for name, key in declared.items():
        _check_value(name, key, _value(config, name))
    for name in _MEMBERS:
        _check_members(name, _value(config, name))
    prompts, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if prompts % mini:
        raise ValueError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini} prompts) must divide "
            f"data.train_batch_size ({prompts} prompts)"
        )
    for name in ("actor_rollout_ref.actor.optim.betas", "sft.betas"):
        betas = _value(config, name)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"{name} are two numbers in [0, 1), given {tuple(betas)}")
    if config.data.train_max_samples == 0:
        raise ValueError("data.train_max_samples is -1 for all rows, or at least 1; given 0")
    reward_functions(config)
    _check_paths(config)
    _check_anchor(config)
    _check_ahead(config)
    if config.sft.steps and not config.sft.train_files:
        raise ValueError(f"sft.steps is {config.sft.steps}, but sft.train_files names no data")
    kind = losses.ALGORITHMS[config.algorithm.adv_estimator]
    if kind.needs_teacher and not config.teacher.path:
        raise ValueError(
            f"algorithm.adv_estimator={kind.name} learns from a teacher, and teacher.path names "
            "none: give the folder or Hub name of a model with the policy's vocabulary"
        )
    _refuse_kl_without_effect(config)
    _refuse_unmet_needs(config, declared)
    _refuse_parameters_of_others(config)
    _refuse_lora_without_effect(config)
    _check_best_metric(config)


# What the members of a tuple are, by its key.
_MEMBERS: dict[str, tuple[type | tuple, str]] = {
    "actor_rollout_ref.actor.optim.betas": ((int, float), "numbers"),
    "sft.betas": ((int, float), "numbers"),
    "eval.ks": (int, "whole numbers"),
    "trainer.profile_steps": (int, "whole numbers"),
    "environment.tools": (str, "names"),
}


def _check_members(name: str, value) -> None:
    wanted, noun = _MEMBERS[name]
    members = value if isinstance(value, tuple | list) else [value]
    for member in members:
        if not isinstance(member, wanted) or isinstance(member, bool):
            raise ValueError(f"{name} is a tuple of {noun}; given {member!r:.40} in it")


def _check_value(name: str, key: Key, value) -> None:
    if key.choices and value not in key.choices:
        choices = ", ".join(filter(None, key.choices))
        raise ValueError(f"{name} is one of {choices}; given {value!r}")
    if type(value) is int:
        most = LARGEST if key.most is None else int(key.most)
        if value > most:
            raise ValueError(f"{name} is at most {most:,}; given {value:,}")
        if key.least is not None and value < key.least:
            raise ValueError(f"{name} is at least {key.least:g}, given {value:,}")
    if not isinstance(value, int | float):
        return
    if key.above is not None and not key.above < value <= (key.most or LARGEST):
        raise ValueError(f"{name} is {key.bounds}; given {value}")
    if key.least is None:
        if not math.isfinite(value):
            raise ValueError(f"{name} is a finite number; given {value}")
        return
    if key.most is not None and not key.least <= value <= key.most:
        raise ValueError(f"{name} is in [{key.least:g}, {key.most:g}], given {value}")
    if not key.least <= value < float("inf"):  # NaN is neither
        raise ValueError(f"{name} is at least {key.least:g}, given {value}")


def _check_anchor(config: ConfigDict) -> None:
    kind = losses.ALGORITHMS[config.algorithm.adv_estimator]
    if config.anchor.mode == "on_policy":
        return
    if kind.on_policy_anchor and config.anchor.mode != "sampler":
        raise ValueError(
            f"algorithm.adv_estimator={kind.name} takes the ratio to the policy that sampled, so "
            f"it needs anchor.mode=on_policy or sampler; given {config.anchor.mode!r}. To stay "
            "near the policy before the first iteration, set algorithm.beta_reference_kl"
        )
    most = config.trainer.max_anchor_kl
    if config.anchor.mode == "kl_triggered" and 0 < most <= config.anchor.kl_threshold:
        raise ValueError(
            f"trainer.max_anchor_kl={most} skips every step before the anchor is renewed at "
            f"anchor.kl_threshold={config.anchor.kl_threshold}: set it higher, or leave it at 0"
        )
    if config.algorithm.sampler_correction not in ("auto", "none"):
        raise ValueError(
            f"algorithm.sampler_correction={config.algorithm.sampler_correction} compares the "
            "sampler with the policy before the update, so it needs anchor.mode=on_policy; given "
            f"{config.anchor.mode!r}"
        )


def _check_ahead(config: ConfigDict) -> None:
    rollout = config.actor_rollout_ref.rollout
    most = rollout.max_staleness * config.data.train_batch_size
    if rollout.ahead > most:
        raise ValueError(
            "actor_rollout_ref.rollout.ahead is at most max_staleness times "
            f"data.train_batch_size, {most}, or groups would get older than max_staleness; given "
            f"{rollout.ahead}"
        )
    if config.environment.url and rollout.max_staleness:
        raise ValueError(
            "actor_rollout_ref.rollout.max_staleness above 0 does not go with environment.url: set "
            "one of the two back"
        )


def _refuse_kl_without_effect(config: ConfigDict) -> None:
    actor = config.actor_rollout_ref.actor
    one_step = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    if not one_step or config.anchor.mode != "on_policy":
        return
    kind = losses.ALGORITHMS[config.algorithm.adv_estimator]
    more_steps = ("ppo_epochs", "ppo_mini_batch_size")
    more_steps = " or ".join(f"actor_rollout_ref.actor.{name}" for name in more_steps)
    cures = [f"take more steps by {more_steps}"]
    cures += [] if kind.on_policy_anchor else ["set anchor.mode=fixed"]
    reference = "set algorithm.beta_reference_kl, which pulls to the policy before the first step"
    for key, more in (("algorithm.beta_anchor_kl", [reference]), ("trainer.max_anchor_kl", [])):
        if _value(config, key):
            raise ValueError(
                f"{key}={_value(config, key)} has no effect on one optimizer step an iteration "
                "under the on-policy anchor, where the KL and its gradient are 0: "
                f"{', or '.join(cures + more)}"
            )


def _refuse_unmet_needs(config: ConfigDict, declared: dict[str, Key]) -> None:
    default = default_config()
    default.algorithm.adv_estimator = config.algorithm.adv_estimator
    _fill_in_defaults_of_the_algorithm(default)
    for name, key in declared.items():
        unmet = [need for need in key.needs if not need.is_met(config)]
        if unmet and _value(config, name) != _value(default, name):
            raise ValueError(
                f"{name}={_value(config, name)} has no effect without {unmet[0].text}; leave it "
                f"at the default ({_value(default, name)!r}) or see to that too"
            )


def _refuse_parameters_of_others(config: ConfigDict) -> None:
    algorithm, default = config.algorithm, default_config().algorithm
    own = losses.ALGORITHMS[algorithm.adv_estimator].__dataclass_fields__
    others = {p.name for p in losses.parameters.union(losses.ALGORITHMS.values())} - own.keys()
    changed = [f"algorithm.{name}" for name in others if algorithm[name] != default[name]]
    if changed:
        raise ValueError(
            f"{', '.join(sorted(changed))}: no effect under algorithm.adv_estimator="
            f"{algorithm.adv_estimator}; leave at the default"
        )


def _refuse_lora_without_effect(config: ConfigDict) -> None:
    model, default = config.actor_rollout_ref.model, default_config().actor_rollout_ref.model
    keys = ("lora_rank", "lora_alpha", "lora_target_modules")
    changed = [f"actor_rollout_ref.model.{key}" for key in keys if model[key] != default[key]]
    if model.lora_adapter_path and changed:
        raise ValueError(
            f"{', '.join(changed)}: no effect beside actor_rollout_ref.model.lora_adapter_path, "
            "whose folder says rank, alpha and targets; leave at the default"
        )
    if changed and not model.lora_rank:
        raise ValueError(
            f"{', '.join(changed)}: no effect without actor_rollout_ref.model.lora_rank, which is "
            "0 (no LoRA)"
        )


def make_algorithm(config: ConfigDict) -> losses.Algorithm:
    """The loss that `algorithm.adv_estimator` names, with its parameters.

    Raises:
      ValueError: for a value that cannot work.
    """
    names = [p.name for p in losses.parameters.union(losses.ALGORITHMS.values())]
    with whole_keys(section("algorithm", names)):
        return losses.make_algorithm(config.algorithm.adv_estimator, config.algorithm)


def _check_best_metric(config: ConfigDict) -> None:
    """Refuses a name that no row has, by which no checkpoint would ever be the best."""
    name = config.trainer.best_metric
    if not name:
        return
    evaluated = bool(config.data.val_files) and config.trainer.test_freq >= 0
    if name.startswith("eval/") and not evaluated:
        lacks = "trainer.test_freq of at least 0" if config.data.val_files else "data.val_files"
        raise ValueError(
            f"trainer.best_metric={name} has no effect without {lacks}; leave it at the "
            "default ('') or see to that too"
        )
    algorithm = make_algorithm(config)
    names = metric_names.of_rows(
        [metric.name for metric in algorithm.metrics],
        filtered=config.algorithm.filter_groups,
        ahead=config.actor_rollout_ref.rollout.max_staleness > 0,
        evaluated=evaluated,
        num_samples=config.eval.n,
        ks=tuple(config.eval.ks),
        by_category=bool(config.eval.category_key) or "=" in config.data.val_files,
        in_pages=config.actor_rollout_ref.rollout.expected_response_length > 0,
        in_turns=bool(config.environment.path or config.environment.url),
        tools=bool(config.environment.path),
        mixture=True,  # the config alone does not say
    )
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"trainer.best_metric={name}: no row of this run has it; did you mean {near}? "
            "docs/metrics.md lists them"
        )


def check_overrides(argv: list[str]) -> None:
    """Checks that every `--config.KEY=...` of a command line names a key.

    Raises:
      ValueError: naming the nearest key.
    """
    known = set(keys(default_config()))
    for argument in argv:
        key = argument.lstrip("-").split("=", 1)[0]
        if not argument.startswith("-") or not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        above, _, below = key.rpartition(".")
        if above in known and isinstance(_value(default_config(), above), ConfigDict):
            raise ValueError(f"{above} is set as a whole: --config.{above}=\"{{'{below}': ...}}\"")
        if key not in known:
            raise ValueError(f"the config has no key {key}{_advice(key, known)}")


def _advice(key: str, known: Collection[str]) -> str:
    """What to do in place of a key that there is not; continues the sentence that says so."""
    if cure := other_trainers.cure_of(key):
        of = f", a name of {cure.trainers}"
        return f"{of}; did you mean {cure}?" if cure.keys else f"{of}; {cure}"
    last = key.rpartition(".")[2]
    same = [name for name in known if name.endswith(f".{key}")]
    same = same or [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, same, n=2, cutoff=0.0)
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=_NEAR)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; `adpo-jax keys WORD` lists those that have to do with a word, such as {last!r}"


def _value(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _set(config: ConfigDict, key: str, value) -> None:
    above, _, last = key.rpartition(".")
    (_value(config, above) if above else config)[last] = value


def _check_paths(config: ConfigDict) -> None:
    """Refuses names by which the run would write outside its folder."""
    for key in ("trainer.project_name", "trainer.experiment_name"):
        if not _NAME.fullmatch(_value(config, key)):
            raise ValueError(
                f"{key} is the name of a folder, letters, digits and _.+=@,- without a leading "
                f"dot; given {_value(config, key)!r}. --workdir takes any path"
            )
    folder = PurePath(config.trainer.rollout_data_dir)
    if folder.is_absolute() or ".." in folder.parts:
        raise ValueError(
            "trainer.rollout_data_dir is a folder of its own within the run's folder; given "
            f"{str(folder)!r}"
        )
