"""A real language model on a laptop: SmolLM2-135M-Instruct learns to show its working.

python -m adpo_jax.main --config=configs/smollm2.py
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    sft = config.sft
    sft.train_files = "embedded:word_problems"
    sft.steps = 16
    sft.batch_size = 16
    sft.lr = 5e-5
    sft.lr_warmup_steps = 4

    data = config.data
    data.train_files = "embedded:word_problems"
    data.val_files = "embedded:word_problems"
    data.max_prompt_length = 96
    data.max_response_length = 64
    data.train_batch_size = 16

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 2e-5
    optim.lr_warmup_steps = 2

    trainer = config.trainer
    trainer.experiment_name = "smollm2"
    trainer.bf16 = False
    trainer.total_training_steps = 40
    trainer.test_freq = 10
    trainer.save_freq = 20
    return config
