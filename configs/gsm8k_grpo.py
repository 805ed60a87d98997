"""GRPO on GSM8K with the budget of configs/gsm8k.py: same prompts, samples, tokens and schedule.

    python -m adpo_jax.main --config=configs/gsm8k_grpo.py

The baseline to compare ADPO with. Not yet run at this size: no result is claimed here. It has no
pull to the policy before the first iteration; DeepSeekMath's is
`--config.algorithm.beta_reference_kl=0.04`, and costs a copy of the parameters and a forward an
iteration.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))["get_config"]()
    config.algorithm.adv_estimator = "grpo"
    config.algorithm.clip_low = 0.2
    config.algorithm.clip_high = 0.2
    config.algorithm.loss_aggregation = "token-mean"
    config.trainer.experiment_name = "qwen3_0_6b_grpo"
    return config
