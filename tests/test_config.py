import functools
import re
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parsing import CONFIGS, parse

from adpo_jax.config import default_config
from adpo_jax.losses import PaddedTokens
from adpo_jax.run import config_checks, other_trainers, setup
from adpo_jax.run import keys as list_keys
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.config_checks import check_overrides, finalized


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_has_every_key(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked
    finalized(config)
    assert set(flat(config)) >= set(flat(default_config())) - {
        "reward_model.reward_kwargs",
        "data.chat_template_kwargs",
        "actor_rollout_ref.model.hf_config",
        "actor_rollout_ref.model.override_config",
    }


def flat(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items") and len(value):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_a_misspelt_key_is_refused_and_the_nearest_named():
    with pytest.raises(ValueError, match=r"did you mean algorithm\.num_generations\?"):
        check_overrides(["main", "--config.algorithm.num_generation=4"])
    check_overrides(["main", "--config.algorithm.tau=4", "--config.reward_model.reward_kwargs={}"])
    with pytest.raises(ValueError, match="reward_kwargs is set as a whole"):
        check_overrides(["main", "--config.reward_model.reward_kwargs.ngram_size=3"])


FOREIGN = {
    "actor_rollout_ref.rollout.n": "a name of verl; did you mean algorithm.num_generations?",
    "rollout.n": "did you mean algorithm.num_generations?",
    "algorithm.kl_ctrl.kl_coef": "did you mean algorithm.beta_reference_kl: its weight",
    "data.filter_overlong_prompts": "did you mean data.overlong_prompts: filter or truncate",
    "actor_rollout_ref.rollout.val_kwargs.n": "did you mean eval.n and eval.temperature",
    "rollout.multi_turn.enable": "did you mean environment.path and environment.max_turns?",
    "algorithm.filter_groups.enable": "did you mean algorithm.filter_groups: true or false?",
    "loss_agg_mode": "a name of verl and Tunix; did you mean algorithm.loss_aggregation?",
    "trainer.val_only": "a name of verl; `adpo-jax evaluate --model=RUN` evaluates alone",
    "trainer.resume_mode": "the flag is --resume=auto, never or must",
    "trainer.max_completion_length": "a name of TRL; did you mean data.max_response_length?",
    "teacher.model": "the config has no key teacher.model; ",  # no setting of TRL's
    "trainer.num_generations": "trainer.num_generations; did you mean algorithm.num_generations?",
    "trainer.frobnicate": "`adpo-jax keys WORD` lists those that have to do with a word, such as",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_of_another_trainer_is_answered_with_ours(name):
    with pytest.raises(ValueError, match=re.escape(FOREIGN[name])):
        check_overrides(["main", f"--config.{name}=1"])


def test_names_of_other_trainers_are_those_of_the_documentation():
    known = set(flat(default_config()))
    missing = {key for cure in other_trainers.NAMES.values() for key in cure.keys} - known
    assert missing == set()
    ends = {name.rpartition(".")[2] for name in known}
    page = (CONFIGS.parent / "docs" / "coming_from.md").read_text()
    documented = set()
    for row in re.findall(r"^\| (?!what|---)(.*) \|$", page, re.M):
        cells = row.split(" | ")
        assert len(cells) == 5, row
        text = " ".join(cells[1:4]) + " ".join(re.findall("verl's `[^`]*`", cells[4]))
        for code in re.findall("`([^`]*)`", text):
            documented |= set(re.findall(r"(?<!\w)[a-z][a-z_.]*[a-z]", code.partition("=")[0]))
    told = documented | {n.rpartition(".")[2] for n in documented}
    for name in other_trainers.NAMES:
        assert name.rpartition(".")[2] in told, f"{name} is not in docs/coming_from.md"
    answered = {n.rpartition(".")[2] for n in other_trainers.NAMES} | ends
    unanswered = {name for name in documented if name.rpartition(".")[2] not in answered}
    assert unanswered == {"get_soft_overlong_punishment"}  # a function, no setting


def test_keys_finds_names_of_other_trainers(monkeypatch, capsys):
    for word in ("resume", "filter_overlong", "val_only"):
        monkeypatch.setattr("sys.argv", ["adpo-jax keys", word])
        assert list_keys.main() == 0
    told = capsys.readouterr().out
    for words in ("--resume=auto", "here: data.overlong_prompts", "`adpo-jax evaluate"):
        assert words in told


def test_log_probs_of_the_whole_distribution_are_asked_for_where_sampling_truncates():
    source = types.SimpleNamespace(stop_token_ids=(1,))
    rollout = "--config.actor_rollout_ref.rollout"
    for override, wanted in (("temperature=0.7", False), ("top_p=0.9", True), ("min_p=0.1", True)):
        sampling = setup.make_sampling(parse(f"{rollout}.{override}"), source)
        assert sampling.full_log_probs == wanted


def test_the_published_recipe_has_the_published_values():
    config = parse(name="math_level3")
    algorithm = config.algorithm
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-1.7B"
    assert (algorithm.num_generations, algorithm.tau, algorithm.beta_reward) == (8, 0.8, 0.5)
    assert (algorithm.adaptive_tau_alpha, algorithm.adaptive_tau_min) == (1.0, 0.1)
    assert config.actor_rollout_ref.actor.optim.lr == 1.5e-5
    assert config.trainer.total_epochs == 2


def test_grpo_config_differs_from_adpo_in_the_algorithm_and_the_name_alone():
    adpo, grpo = parse(name="gsm8k").to_dict(), parse(name="gsm8k_grpo").to_dict()
    assert adpo.pop("algorithm") != grpo.pop("algorithm")
    assert adpo["trainer"].pop("experiment_name") != grpo["trainer"].pop("experiment_name")
    assert adpo == grpo


def test_lists_and_loggers_are_taken_as_users_of_verl_write_them():
    for files in ("['a.parquet', 'b.parquet']", "[a.parquet,b.parquet]", "a.parquet,b.parquet"):
        config = parse(f"--config.data.train_files={files}", f"--config.data.val_files={files}")
        assert config.data.train_files == config.data.val_files == "a.parquet,b.parquet"
    for logger in ("('console', 'wandb')", "['tensorboard','wandb']", "[console,wandb]"):
        assert parse(f"--config.trainer.logger={logger}").trainer.logger == ("wandb",)
    assert parse("--config.trainer.logger=console").trainer.logger == ()
    many = [f"train-{i:05d}-of-00010.parquet" for i in range(10)]  # no file has so long a name
    assert parse(f"--config.data.train_files={many}").data.train_files == ",".join(many)


REFUSALS = {
    "--config.data.train_files=['a.parquet','b.parquet'": "list .* has no end; write",
    "--config.data.val_files=[1, 2]": "data.val_files is a list of texts",
    "--config.data.train_batch_size=0": "data.train_batch_size is at least 1",
    "--config.algorithm.num_generations=1": "algorithm.num_generations is at least 2",
    "--config.actor_rollout_ref.actor.ppo_mini_batch_size=5": "must divide data.train_batch_size",
    "--config.algorithm.adv_estimator=ppo": "one of adpo, .*, opd; given 'ppo'",
    "--config.trainer.total_training_steps=0": "total_training_steps is at least 1",
    "--config.sft.train_files=": "sft.train_files names no data",
    "--config.actor_rollout_ref.rollout.temperature=0": "training samples",
    "--config.actor_rollout_ref.rollout.temperature=0.0009": "at least 0.001: training samples",
    "--config.actor_rollout_ref.rollout.temperature=inf": "temperature is above 0; given inf",
    "--config.actor_rollout_ref.rollout.temperature=nan": "temperature is above 0; given nan",
    "--config.actor_rollout_ref.rollout.gpu_memory_utilization=3": "above 0 and at most 1; given 3",
    "--config.actor_rollout_ref.model.lora_alpha=nan": "lora_alpha is above 0; given nan",
    "--config.eval.top_p=0": "eval.top_p is above 0 and at most 1; given 0.0",
    "--config.eval.temperature=-1": "eval.temperature is at least 0, given -1.0",
    "--config.anchor.kl_threshold=nan": "kl_threshold is a finite number; given nan",
    "--config.algorithm.tau=inf": "algorithm.tau is a finite number; given inf",
    "--config.actor_rollout_ref.actor.grad_clip=-1": "grad_clip is at least 0",
    "--config.trainer.seed=-1": "trainer.seed is at least 0",
    "--config.algorithm.beta_anchor_kl=0.1": "has no effect on one optimizer step",
    "--config.algorithm.clip_low=0.1": "no effect under algorithm.adv_estimator=adpo",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_a_config_that_cannot_work_is_refused(override):
    with pytest.raises(ValueError, match=REFUSALS[override]):
        parse(override)


def test_an_anchor_that_is_never_renewed_for_steps_that_are_skipped_before_is_refused():
    triggered = ("--config.anchor.mode=kl_triggered", "--config.anchor.kl_threshold=0.1")
    with pytest.raises(ValueError, match="max_anchor_kl=0.05 skips every step before"):
        parse(*triggered, "--config.trainer.max_anchor_kl=0.05")
    parse(*triggered, "--config.trainer.max_anchor_kl=0.2")


def test_grpo_refuses_an_anchor_that_is_not_the_sampling_policy():
    with pytest.raises(ValueError, match="anchor.mode=on_policy"):
        parse("--config.algorithm.adv_estimator=grpo", "--config.anchor.mode=ema")


@pytest.mark.parametrize("key", ["tau=0.5", "clip_low=0.1", "scale_rewards=none"])
def test_rloo_refuses_parameters_of_the_other_losses(key):
    with pytest.raises(ValueError, match="no effect under algorithm.adv_estimator=rloo"):
        parse("--config.algorithm.adv_estimator=rloo", f"--config.algorithm.{key}")


def test_a_micro_batch_of_rows_that_splits_a_group_is_refused_with_the_sizes_that_work():
    rows = "--config.actor_rollout_ref.actor.layout=rows"
    config = parse("--config.trainer.per_device_train_batch_size=12", rows)
    with pytest.raises(ValueError, match=r"whole groups of 8 .* these work: \[8, 16, 32"):
        batch_plan(config, num_shards=1)
    config = parse("--config.trainer.per_device_train_batch_size=16", rows)
    assert batch_plan(config, num_shards=2).micro_prompts == 4


def test_packed_micro_batches_have_any_size():
    config = parse("--config.trainer.per_device_train_batch_size=3")
    assert batch_plan(config, num_shards=2).micro_completions == 3
    with pytest.raises(ValueError, match="actor.layout is one of packed, rows"):
        parse("--config.actor_rollout_ref.actor.layout=columns")


def test_a_batch_that_does_not_spread_over_the_devices_is_refused():
    with pytest.raises(ValueError, match="32 prompts does not spread over 3 devices"):
        batch_plan(parse(), num_shards=3)


@functools.cache
def adpo_loss_under(*overrides):
    """Loss plus size of its gradient, of a fixed batch under the algorithm of the command line."""
    config = parse(*overrides)
    algorithm = config_checks.make_algorithm(config)
    rng = np.random.default_rng(0)
    P, G, T = 3, config.algorithm.num_generations, 5
    log_probs = jnp.asarray(rng.normal(-2, 0.5, (P, G, T)), jnp.float32)
    anchor = log_probs + jnp.asarray(rng.normal(0, 0.4, (P, G, T)), jnp.float32)
    rewards = rng.normal(0, 1, (P, G)).astype(np.float32)
    rewards[0] = -np.abs(rewards[0]) * 0.05
    mask = jnp.asarray(rng.random((P, G, T)) < 0.8, jnp.float32)
    kwargs = {}
    if config.algorithm.adaptive_tau_mode == "policy_entropy":
        kwargs["entropy_P"] = jnp.array([0.2, 0.5, 0.9])
    tokens = PaddedTokens(mask > 0)
    prepared = algorithm.prepare(jnp.asarray(rewards), tokens, **kwargs)
    found = {"policy": log_probs, "anchor": anchor, "reference": anchor - 0.1}
    found["sampler"] = anchor - jnp.asarray(rng.exponential(1.0, (P, G, T)), jnp.float32)

    def loss(log_probs):
        return algorithm.loss(found | {"policy": log_probs}, tokens, prepared, entropy=-log_probs)[
            0
        ]

    value, gradient = jax.value_and_grad(loss)(log_probs)
    return float(value + jnp.abs(gradient).sum())


ALGORITHM_OVERRIDES = {
    "num_generations": ("4",),
    "tau": ("0.5",),
    "use_adaptive_tau": ("false",),
    "adaptive_tau_alpha": ("0.9",),
    "adaptive_tau_min": ("0.75",),
    "adaptive_tau_mode": ("policy_entropy",),
    "adaptive_tau_max": ("0.81", "--config.algorithm.adaptive_tau_mode=policy_entropy"),
    "beta_reward": ("0.3",),
    "scale_rewards": ("none",),
    "min_reward_std": ("0.3",),
    "beta_anchor_kl": ("0.1", "--config.actor_rollout_ref.actor.ppo_epochs=2"),
    "beta_reference_kl": ("0.1",),
    "drop_all_failed_prompts": ("true",),
    "length_normalize": ("true",),
    "adv_estimator": ("grpo",),
    "clip_low": ("0.05", "--config.algorithm.adv_estimator=grpo"),
    "clip_high": ("0.05", "--config.algorithm.adv_estimator=grpo"),
    "loss_aggregation": ("sequence-mean", "--config.algorithm.adv_estimator=grpo"),
    "constant_length": ("9", "--config.algorithm.adv_estimator=dr_grpo"),
    "dual_clip": ("1.1", "--config.algorithm.adv_estimator=grpo"),
    "anchor_weight": ("0.5",),
    "divergence": ("reverse",),
    "kl_estimator": ("k1", "--config.algorithm.beta_reference_kl=0.1"),
    "sampler_correction": ("truncate",),
    "correction_level": ("sequence", "--config.algorithm.sampler_correction=mask"),
    "correction_cap": ("1.2", "--config.algorithm.sampler_correction=truncate"),
    "entropy_bonus": ("0.1",),
    "tau_pos": ("2.0", "--config.algorithm.adv_estimator=sapo"),
    "tau_neg": ("2.0", "--config.algorithm.adv_estimator=sapo"),
    "mask_divergence": (
        "kl",
        "--config.algorithm.adv_estimator=dppo",
        "--config.algorithm.clip_low=0.02",
        "--config.algorithm.clip_high=0.02",
    ),
    "ratio_cap": ("1.05", "--config.algorithm.adv_estimator=dppo"),
    "baseline": ("group", "--config.algorithm.adv_estimator=reinforce_pp"),
}


@pytest.mark.parametrize("key", ALGORITHM_OVERRIDES)
def test_each_algorithm_parameter_on_the_command_line_changes_the_loss(key):
    value, *context = ALGORITHM_OVERRIDES[key]
    changed = adpo_loss_under(f"--config.algorithm.{key}={value}", *context)
    assert abs(changed - adpo_loss_under(*context)) > 1e-5


def test_every_algorithm_parameter_is_covered_by_the_test_above():
    elsewhere = {"filter_groups", "filter_max_attempts"}  # see test_config_keys.py
    covered = ALGORITHM_OVERRIDES.keys() | OF_SEVERAL_REWARDS_OR_A_TEACHER.keys()
    assert covered == set(default_config().algorithm) - elsewhere


OF_TEACHER = (
    "--config.algorithm.adv_estimator=opd",
    "--config.teacher.path=folder",
    "--config.algorithm.distillation_loss=jsd",
)
# What these change of the loss is tested in test_losses.py and test_distillation.py.
OF_SEVERAL_REWARDS_OR_A_TEACHER = {
    "multi_objective_aggregation": ("normalize_then_sum",),
    "distillation_loss": ("jsd", *OF_TEACHER[:2]),
    "jsd_beta": (0.25, *OF_TEACHER),
}


@pytest.mark.parametrize("key", OF_SEVERAL_REWARDS_OR_A_TEACHER)
def test_a_parameter_of_several_rewards_or_a_teacher_reaches_the_algorithm(key):
    value, *context = OF_SEVERAL_REWARDS_OR_A_TEACHER[key]
    before = getattr(config_checks.make_algorithm(parse(*context)), key)
    changed = config_checks.make_algorithm(parse(*context, f"--config.algorithm.{key}={value}"))
    assert getattr(changed, key) == value != before
