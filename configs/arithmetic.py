"""The embedded default: arithmetic word problems, a 0.6M-parameter model from scratch, a CPU.

python -m adpo_jax.main --config=configs/arithmetic.py
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.sft.train_files = "embedded:arithmetic"
    config.sft.steps = 500
    config.sft.batch_size = 64
    config.sft.lr = 3e-3

    config.data.train_files = "embedded:arithmetic"
    config.data.val_files = "embedded:arithmetic"
    config.data.prompt_template = "{prompt}\n"
    config.data.max_prompt_length = 44
    config.data.max_response_length = 36
    config.data.train_batch_size = 32

    config.algorithm.num_generations = 8
    config.actor_rollout_ref.actor.optim.lr = 1e-3
    config.actor_rollout_ref.actor.optim.lr_warmup_steps = 5

    config.trainer.experiment_name = "arithmetic"
    config.trainer.bf16 = False
    config.trainer.total_training_steps = 40
    config.trainer.test_freq = 10
    config.trainer.save_freq = 20
    return config
