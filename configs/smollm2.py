"""SmolLM2-135M-Instruct on word problems: a real language model learns to write its working down.

    python -m adpo_jax.main --config=configs/smollm2.py

Downloads the model from the Hugging Face Hub (`pip install '.[hub]'`), or takes a folder that has
it: `--config.actor_rollout_ref.model.path=FOLDER`. The problems are made up by templates.

A short supervised stage imitates what people say: most blurt out an answer, which is mostly wrong,
and fewer write their working down. Then ADPO rewards right answers, 16 prompts x 8 completions an
iteration. In float32 on a CPU; what it reaches is in docs/smollm2.md.
"""

from adpo_jax.config import default_config

PROBLEMS = "embedded:word_problems?max_steps=2&largest=12"


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    data = config.data
    data.train_files = PROBLEMS
    data.val_files = PROBLEMS
    data.apply_chat_template = False
    # Without a word before it, a number that a question begins with would be lost on the model,
    # which attends to its first token whatever it is.
    data.prompt_template = "Question: {prompt}\nAnswer:"
    data.max_prompt_length = 80
    data.max_response_length = 60
    data.train_batch_size = 16

    sft = config.sft
    sft.train_files = PROBLEMS
    sft.steps = 200
    sft.batch_size = 16
    sft.lr = 1e-4
    sft.lr_warmup_steps = 5

    optim = config.actor_rollout_ref.actor.optim
    optim.lr = 2e-5
    optim.lr_warmup_steps = 2

    trainer = config.trainer
    trainer.project_name = "word_problems"
    trainer.experiment_name = "smollm2_adpo"
    trainer.bf16 = False
    trainer.per_device_train_batch_size = 16
    trainer.total_training_steps = 20
    trainer.test_freq = 10
    trainer.save_freq = 20
    return config
