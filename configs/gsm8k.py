"""ADPO on GSM8K with Qwen3-0.6B.

    python -m adpo_jax.main --config=configs/gsm8k.py

Downloads the model and the data set from the Hugging Face Hub (`pip install '.[hub]'`). With local
copies, or a model of another size, add

    --config.actor_rollout_ref.model.path=FOLDER --config.data.train_files=train.jsonl \\
    --config.data.val_files=test.jsonl

64 prompts x 8 completions an iteration, 8 completions a device in a micro-batch. Not yet run at
this size: no result is claimed, and the micro-batch is a cautious choice for devices with 80 GB.
The same file with a small model runs on a CPU (tests/test_gsm8k_run.py).
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "Qwen/Qwen3-0.6B"

    data = config.data
    data.train_files = "openai/gsm8k:main"
    data.val_files = "openai/gsm8k:main"
    data.prompt_key = "question"
    data.answer_key = "answer"
    data.prompt_template = "{prompt}\n\nThink step by step and put the final answer in \\boxed{}."
    with data.unlocked():
        data.chat_template_kwargs = {"enable_thinking": False}
    data.max_prompt_length = 512
    data.max_response_length = 1024
    data.train_batch_size = 64

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 1e-6
    optim.lr_warmup_steps = 5
    optim.lr_scheduler_type = "cosine"
    optim.min_lr_ratio = 0.1

    trainer = config.trainer
    trainer.project_name = "gsm8k"
    trainer.experiment_name = "qwen3_0_6b_adpo"
    trainer.total_epochs = 1
    trainer.per_device_train_batch_size = 8
    trainer.gradient_checkpointing = "full"
    trainer.save_freq = 50
    trainer.test_freq = 25
    return config
