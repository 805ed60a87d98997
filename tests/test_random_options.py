"""Random sets of options: a run that is stopped and goes on ends like one that ran through.

    pytest -m long tests/test_random_options.py

A fault of two options together is found by no test of either.
"""

import itertools
import random

import jax
import pytest
from parsing import parse
from test_faults import digests
from test_resume import REWARD, After
from test_train import TINY, scalars

import adpo_jax
from adpo_jax.run import setup
from adpo_jax.run.interruption import Interrupted
from adpo_jax.run.preparation import prepare
from adpo_jax.train import run

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
TWO_REWARDS = (
    "reward_functions=({{'path':'{reward}','name':'letters'}},"
    "{{'name':'length_penalty','weight':0.5}})"
)
AHEAD = (f"{ROLLOUT}.max_staleness=1", "anchor.mode=sampler")
MIXTURE = (
    f"{MODEL}.hf_config={{{{'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, "
    "'head_dim': 8, 'architectures': ['Qwen3MoeForCausalLM'], 'model_type': 'qwen3_moe', "
    "'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 8, "
    "'norm_topk_prob': True}}"
)


def each(key: str, *values) -> list[tuple[str]]:
    """An alternative for each value of a key."""
    return [(f"{key}={value}",) for value in values]


# The alternatives of an option, of which a case has one; an alternative is a tuple of overrides.
OPTIONS = (
    each("algorithm.adv_estimator", "tpo", "lpo", "grpo", "dapo", "dr_grpo", "gspo", "gmpo"),
    each("algorithm.adv_estimator", "cispo", "sapo", "dppo", "reinforce_pp", "rloo"),
    each("anchor.mode", "fixed", "ema", "kl_triggered"),
    [("anchor.mode=fixed", "anchor.offload=true"), ("anchor.mode=ema", "anchor.offload=true")],
    each("algorithm.filter_groups", "true"),
    [AHEAD, (*AHEAD, f"{ROLLOUT}.ahead=2"), (f"{ROLLOUT}.max_staleness=2", AHEAD[1])],
    each(f"{ACTOR}.ppo_epochs", 2),
    each(f"{ACTOR}.ppo_mini_batch_size", 2, 4),
    each(f"{ACTOR}.optimizer_offload", "true"),
    each(f"{ACTOR}.optim.mu_dtype", "bfloat16"),
    each(f"{ACTOR}.optim.lr_scheduler_type", "cosine", "linear"),
    each(f"{ACTOR}.grad_clip", 0.0),
    each(f"{ACTOR}.layout", "rows"),
    [(f"{MODEL}.lora_rank=2", "sft.steps=0")],
    [(MIXTURE,), (MIXTURE, f"{ROLLOUT}.router_replay=true")],
    each("algorithm.beta_reference_kl", 0.05),
    each("algorithm.entropy_bonus", 0.01),
    each("algorithm.sampler_correction", "truncate", "mask", "none"),
    each("algorithm.drop_all_failed_prompts", "true"),
    each("algorithm.min_reward_std", 0.2),
    each("algorithm.length_normalize", "true"),
    [("algorithm.use_adaptive_tau=false", "algorithm.tau=0.7")],
    each("algorithm.num_generations", 3, 4),
    each(f"{ROLLOUT}.cache_dtype", "int8", "bfloat16"),
    each(f"{ROLLOUT}.num_slots", 2, 3, 8),
    each(f"{ROLLOUT}.prefill_chunk_size", 16),
    each(f"{ROLLOUT}.top_k", 1, 5),
    each(f"{ROLLOUT}.temperature", 0.7, 1.3),
    each(f"{ROLLOUT}.expected_response_length", 3),
    each("trainer.gradient_checkpointing", "true", "save_dots", "offload"),
    each("trainer.scan_layers", "false"),
    each("trainer.bf16", "true"),
    each("trainer.per_device_train_batch_size", 2, 4),
    each("trainer.rollout_data_dir", "recorded"),
    each("trainer.best_metric", "eval/accuracy"),
    each("trainer.on_bad_update", "skip"),
    [("trainer.save_freq=1", "trainer.save_total_limit=2")],
    [(TWO_REWARDS, "custom_reward_function.path=", "custom_reward_function.name=good_accuracy")],
    each("data.train_batch_size", 5, 6),
    each("data.train_max_samples", 20),
    each("data.shuffle", "false"),
    each("data.mask_truncated_completions", "true"),
    [("data.overlong_prompts=truncate", "data.max_prompt_length=12")],
    [("eval.n=2", "eval.ks=(1,2)")],
    each("sft.steps", 0),
    each("sft.save_freq", 1),
    [("mesh.data=2", "mesh.fsdp=2"), ("mesh.tensor=2",), ("mesh.sequence=2",)],
    [("mesh.fsdp=4", f"{ROLLOUT}.tensor_model_parallel_size=2")],
    [("mesh.fsdp=2", "mesh.expert=2", MIXTURE)],
)
COMMON = (
    "custom_reward_function.path={reward}",
    "custom_reward_function.name=letters",
    "trainer.total_training_steps=3",
    "trainer.save_freq=2",
    "trainer.test_freq=2",
    f"{ACTOR}.optim.lr=0.01",
)


def drawn(rng: random.Random) -> list[str]:
    """The overrides of a case."""
    options = rng.sample(OPTIONS, rng.randint(3, 7))
    return [override for option in options for override in rng.choice(option)]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_a_run_that_is_stopped_goes_on_under_any_options(seed, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    rng = random.Random(seed)
    # Options that contradict each other are refused, and others are drawn.
    for attempt in itertools.count():
        overrides = drawn(rng)
        devices = jax.devices()[: 4 if any(o.startswith("mesh.") for o in overrides) else 1]
        flags = [f"--config.{o.format(reward=reward)}" for o in (*COMMON, *overrides)]

        def build(config, devices=devices):
            return setup.build(config, devices)

        try:
            config = parse(*TINY, *flags)
            whole = prepare(config, tmp_path / f"whole{attempt}", build=build)
            break
        except ValueError as refusal:
            print(f"refused: {overrides}: {refusal}")
    print(overrides)
    run(whole)
    with pytest.raises(Interrupted):
        run(prepare(config, tmp_path / "run", build=build), After(rng.choice([1, 2])))
    adpo_jax.train(config, tmp_path / "run", build=build)
    of_whole = tmp_path / f"whole{attempt}"
    assert scalars(tmp_path / "run") == scalars(of_whole)
    assert digests(tmp_path / "run", 3) == digests(of_whole, 3)
