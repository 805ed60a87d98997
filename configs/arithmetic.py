"""The embedded default: arithmetic word problems, a 0.6M-parameter model from scratch, a CPU.

python -m adpo_jax.main --config=configs/arithmetic.py
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()

    sft = config.sft
    sft.train_files = "embedded:arithmetic"
    sft.steps = 450
    sft.batch_size = 64
    sft.lr = 3e-3
    sft.betas = (0.9, 0.98)

    data = config.data
    data.train_files = "embedded:arithmetic"
    data.val_files = "embedded:arithmetic"
    data.prompt_template = "{prompt}\n"
    data.max_prompt_length = 26
    data.max_response_length = 28
    data.train_batch_size = 32

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 5e-4
    optim.betas = (0.9, 0.98)
    optim.lr_scheduler_type = "cosine"
    optim.min_lr_ratio = 0.1

    trainer = config.trainer
    trainer.experiment_name = "arithmetic"
    trainer.bf16 = False
    trainer.total_training_steps = 50
    trainer.test_freq = 10
    trainer.save_freq = 20
    return config
