"""A game in several turns on a CPU: a number is to be found in few guesses (docs/environments.md).

    python -m adpo_jax.main --config=configs/guess_number.py

Needs a CPU with two cores; downloads nothing. A supervised cold start imitates games whose guesses
lie anywhere in what is left; the reward is the share of guesses not needed. Seed 0 has a greedy
reward of 0.38 after the cold start, and finds 67% of the numbers in eight guesses. No run has been
taken further than five iterations with these settings, so what it learns is not known yet.
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "embedded:guess_number"

    environment = config.environment
    environment.path = "embedded:guess_number"
    environment.name = "GuessNumber"
    environment.max_turns = 9  # eight guesses, and the last word
    config.custom_reward_function.name = ""  # the game's own reward alone

    sft = config.sft
    sft.train_files = "embedded:guess_number"
    sft.steps = 300
    sft.batch_size = 32
    sft.lr = 3e-3
    sft.betas = (0.9, 0.98)

    data = config.data
    data.train_files = "embedded:guess_number"
    data.val_files = "embedded:guess_number"
    data.allow_control_tokens = True
    data.max_prompt_length = 20
    data.max_response_length = 192
    data.train_batch_size = 16
    config.eval.graded_by = "reward"

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 1e-4
    optim.betas = (0.9, 0.98)
    optim.lr_scheduler_type = "cosine"
    optim.min_lr_ratio = 0.1

    trainer = config.trainer
    trainer.experiment_name = "guess_number"
    trainer.bf16 = False
    trainer.total_training_steps = 40
    trainer.test_freq = 10
    trainer.save_freq = 20
    return config
