"""The published recipe: Qwen3-1.7B on MATH level 3.

    python -m adpo_jax.main --config=configs/math_level3.py

Values of the ADPO authors' Open-R1 run: 8 generations, tau 0.8, beta_reward 0.5, adaptive tau with
alpha 1.0 and floor 0.1, learning rate 1.5e-5, 8 completions a device with 16 accumulation steps on
8 GPUs (128 prompts an optimizer step), 2 epochs. The completion length is not published; 2048
tokens here. They report an accuracy of about 0.35 after the first epoch and 0.45 after the second
(no seed or evaluation set named). Not yet run here: no result is claimed.

Needs 8 devices of 80 GB for the published batch; on fewer, the same run takes more micro-batches.
"""

from adpo_jax.config import default_config


def get_config():
    config = default_config()
    config.actor_rollout_ref.model.path = "Qwen/Qwen3-1.7B"

    algorithm = config.algorithm
    algorithm.num_generations = 8
    algorithm.tau = 0.8
    algorithm.beta_reward = 0.5
    algorithm.use_adaptive_tau = True
    algorithm.adaptive_tau_alpha = 1.0
    algorithm.adaptive_tau_min = 0.1

    with config.reward_model.unlocked():
        config.reward_model.reward_kwargs = {
            "ngram_size": 4,
            "max_penalty": -0.5,
            "penalty_scale_factor": 0.1,
        }

    data = config.data
    data.train_files = "watermelonhjg/MATH-lighteval-level_3"
    data.val_files = ""
    data.prompt_key = "problem"
    data.answer_key = "solution"
    data.prompt_template = "{prompt}\n\nPut the final answer in \\boxed{}."
    data.max_prompt_length = 512
    data.max_response_length = 2048
    data.train_batch_size = 128

    config.actor_rollout_ref.actor.optim.lr = 1.5e-5

    trainer = config.trainer
    trainer.project_name = "math_level3"
    trainer.experiment_name = "qwen3_1_7b_adpo"
    trainer.total_epochs = 2
    trainer.per_device_train_batch_size = 8
    trainer.gradient_checkpointing = "full"
    return config
