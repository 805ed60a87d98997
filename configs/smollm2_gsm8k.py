"""SmolLM2-135M-Instruct on GSM8K: its worked answers first, then rewards for right answers.

    python -m adpo_jax.main --config=configs/smollm2_gsm8k.py

Downloads the model and the data set from the Hugging Face Hub (`pip install '.[hub]'`). With local
copies, add

    --config.actor_rollout_ref.model.path=FOLDER --config.sft.train_files=train.jsonl \\
    --config.data.train_files=train.jsonl --config.data.val_files=test.jsonl

A supervised stage of one pass over the worked answers of the training questions, then 200
iterations of 16 prompts x 8 completions under ADPO. Accuracy on 256 test questions is measured
before and after. Runs on a CPU with two cores and 8 GB in some hours, on a GPU in minutes. Not yet
run to its end: no result is claimed.
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    data = config.data
    data.train_files = "openai/gsm8k:main"
    data.val_files = "openai/gsm8k:main"
    data.max_val_samples = 256
    data.max_prompt_length = 256
    data.max_response_length = 256
    data.train_batch_size = 16

    sft = config.sft
    sft.train_files = "openai/gsm8k:main"
    sft.completion_key = "answer"
    sft.steps = 467
    sft.batch_size = 16
    sft.lr = 5e-5
    sft.lr_warmup_steps = 20

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 1e-5
    optim.lr_warmup_steps = 5

    trainer = config.trainer
    trainer.project_name = "gsm8k"
    trainer.experiment_name = "smollm2_adpo"
    trainer.bf16 = False
    trainer.per_device_train_batch_size = 16
    trainer.total_training_steps = 200
    trainer.test_freq = 50
    trainer.save_freq = 25
    return config
