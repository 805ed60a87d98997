"""Writes the values and gradients that verl and TRL give for the losses that they have too.

    pip install torch verl==0.9.1 trl==1.16.0
    python scripts/make_loss_vectors.py tests/golden/losses

Both libraries' own functions run in float64 on a CPU, over six random batches: masks with holes,
completions of one token, groups whose rewards are equal, ratios far beyond every clip. The
advantages that TRL's loss gets are verl's, since TRL adds 1e-4 to the standard deviation where verl
adds 1e-6. tests/test_losses_others.py compares ours with what is written here.
"""

import argparse
import collections
import contextlib
import inspect
import json
import textwrap
import types
from pathlib import Path

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as verl_losses
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import FSDPActorConfig

# prompts, completions a prompt, tokens; the spread of the log-ratios.
BATCHES = [
    (3, 4, 7, 0.1),
    (3, 4, 7, 1.0),
    (2, 8, 5, 0.4),
    (4, 2, 9, 3.0),
    (2, 4, 1, 0.3),
    (3, 3, 6, 0.01),
]

ARRAYS = ("log_probs", "anchor", "reference", "sampler", "rewards", "several", "mask")
# Of the rewards "several".
WEIGHTS = (1.0, 0.5, -2.0)


def batch(number: int) -> dict[str, torch.Tensor]:
    P, G, T, spread = BATCHES[number]
    rng = np.random.default_rng(number)
    shape = (P * G, T)
    anchor = -rng.exponential(1.0, shape)
    lengths = rng.integers(1, T + 1, (P * G, 1))
    mask = (np.arange(T) < lengths) & (rng.random(shape) > 0.2)
    mask[:, 0] = True  # at least one token is trained on
    rewards = rng.integers(0, 3, P * G).astype(float)
    rewards[:G] = 1.0  # a group of equal rewards
    log_probs = np.minimum(anchor + spread * rng.standard_normal(shape), -1e-3)
    # Of three kinds, one far larger than the others, one often equal, and one that is not given.
    several = np.random.default_rng([number, 1]).integers(0, 3, (P * G, 3)) * [100.0, 1.0, 0.01]
    several[:G, 1], several[-1, 2] = 1.0, np.nan
    found = {
        "log_probs": log_probs,
        "anchor": anchor,
        # It is near the policy: verl cuts its k3 at 10 nats, gradient and all.
        "reference": log_probs + 0.3 * rng.standard_normal(shape),
        "sampler": anchor + 0.5 * rng.standard_normal(shape),
        "rewards": rewards,
        "several": several,
        "mask": mask.astype(float),
    }
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in ARRAYS}


def advantages(b, group: int, kind: str, **options) -> torch.Tensor:
    """verl's advantages [B, T]; the reward lies at each completion's last trained token."""
    mask = b["mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    token_rewards = torch.zeros_like(mask)
    token_rewards[torch.arange(len(mask)), last] = b["rewards"]
    index = np.repeat(np.arange(len(mask) // group), group)
    if kind == "reinforce_pp":
        config = AlgoConfig(gamma=1.0)
        return verl_losses.compute_reinforce_plus_plus_outcome_advantage(
            token_rewards, mask, config=config
        )[0]
    function = {
        "grpo": verl_losses.compute_grpo_outcome_advantage,
        "rloo": verl_losses.compute_rloo_outcome_advantage,
        "reinforce_pp_baseline": verl_losses.compute_reinforce_plus_plus_baseline_outcome_advantage,
    }[kind]
    return function(token_rewards, mask, index, **options)[0]


def decoupled(b, group: int) -> torch.Tensor:
    """TRL's advantages of several rewards, by the lines of its trainer; its 1e-4 is 1e-6 here."""
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    first = next(i for i, line in enumerate(lines) if '== "normalize_then_sum"' in line)
    last = next(i for i in range(first, len(lines)) if lines[i].strip() == "else:")
    found = {
        "torch": torch,
        "nanstd": nanstd,
        "rewards_per_func": b["several"],
        "num_generations": group,
        "unscorable_mask": torch.isnan(b["several"]).all(dim=1),
        "device": "cpu",
        "self": types.SimpleNamespace(
            reward_funcs=WEIGHTS, reward_weights=torch.tensor(WEIGHTS, dtype=torch.float64)
        ),
    }
    text = textwrap.dedent("\n".join(lines[first + 1 : last])).replace("1e-4", "1e-6")
    exec(text, found)
    return found["advantages"]


def actor(low, high, **more) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        **more,
    )


def verl(policy: str, low=0.2, high=0.2, dual=1e9, aggregation="token-mean", advantage="grpo",
         correction=None, kl=None, normed=True, **more):  # fmt: skip
    """A loss of verl: (batch, log-probs that want a gradient, G) -> scalar."""

    def loss(b, log_probs, group):
        options = {"norm_adv_by_std_in_grpo": normed} if advantage == "grpo" else {}
        weights = None
        if correction:
            level, threshold = correction
            apart = (b["anchor"] - b["sampler"]) * b["mask"]
            weights, _ = compute_rollout_correction_weights(
                apart, b["mask"], rollout_is=level, rollout_is_threshold=threshold
            )
        config = actor(low, high, clip_ratio_c=dual, **more)
        value, _ = verl_losses.get_policy_loss_fn(policy)(
            old_log_prob=b["anchor"],
            log_prob=log_probs,
            advantages=advantages(b, group, advantage, **options),
            response_mask=b["mask"],
            loss_agg_mode=aggregation,
            config=config,
            rollout_is_weights=weights,
        )
        if kl:
            penalty = verl_losses.kl_penalty(log_probs, b["reference"], kl)
            value = value + verl_losses.agg_loss(penalty, b["mask"], "token-mean")
        return value

    return loss


def trl(loss_type: str, low=0.2, high=0.2, delta=None, level="token", normed=True, several=False):
    """A loss of TRL: its trainer's own method, over log-probs that are given to it."""

    def loss(b, log_probs, group):
        mask = b["mask"]
        A = advantages(b, group, "grpo", norm_adv_by_std_in_grpo=normed)
        args = types.SimpleNamespace(
            delta=delta,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
            use_bias_correction_kl=False,
        )
        accelerator = types.SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1
        )
        trainer = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                log_probs,
                torch.zeros_like(log_probs),
                None,
            ),
            model=types.SimpleNamespace(training=True),
            accelerator=accelerator,
            args=args,
            _metrics={"train": collections.defaultdict(list)},
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=0.0,
            loss_type=loss_type,
            epsilon_low=low,
            epsilon_high=high,
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=mask.shape[1],
            _entropy_bonus_enabled=False,
        )
        inputs = {
            "prompt_ids": torch.zeros(len(mask), 1),
            "prompt_mask": torch.ones(len(mask), 1),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": decoupled(b, group) if several else (A * mask).sum(1) / mask.sum(1),
            "old_per_token_logps": b["anchor"],
            "num_items_in_batch": mask.sum(),
        }
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)

    return loss


# Ours, its parameters, whose code it is, that code, and whether the value is ours too: where the
# surrogate is a weight times a log-prob, ours has the log-ratio, whose gradient is the same.
LOSSES = [
    ("grpo", {}, "verl", verl("vanilla"), True),
    ("grpo", {"dual_clip": 3.0}, "verl", verl("vanilla", dual=3.0), True),
    ("grpo", {"loss_aggregation": "sequence-mean"}, "trl", trl("grpo"), True),
    ("grpo", {"loss_aggregation": "sequence-mean"}, "verl",
     verl("vanilla", aggregation="seq-mean-token-mean"), True),
    ("grpo",
     {"multi_objective_aggregation": "normalize_then_sum", "loss_aggregation": "sequence-mean"},
     "trl", trl("grpo", several=True), True),
    ("dapo", {}, "trl", trl("dapo", high=0.28), True),
    ("dapo", {}, "verl", verl("vanilla", high=0.28), True),
    ("dr_grpo", {}, "trl", trl("dr_grpo", normed=False), True),
    ("dr_grpo", {}, "verl",
     verl("vanilla", aggregation="seq-mean-token-sum-norm", normed=False), True),
    ("gspo", {}, "verl", verl("gspo", 3e-4, 4e-4, aggregation="seq-mean-token-mean"), True),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.3}, "trl",
     trl("grpo", 0.2, 0.3, level="sequence"), True),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.3, "loss_aggregation": "token-mean"}, "verl",
     verl("gspo", 0.2, 0.3), True),
    ("gmpo", {}, "verl", verl("geo_mean", 0.4, 0.4), True),
    ("cispo", {}, "trl", trl("cispo", high=5.0), False),
    ("cispo", {"clip_low": 0.3, "clip_high": 0.5}, "verl", verl("cispo", 0.3, 0.5), False),
    ("sapo", {}, "trl", trl("sapo"), True),
    ("sapo", {}, "verl", verl("sapo", tau_pos=1.0, tau_neg=1.05), True),
    ("dppo", {}, "verl", verl("dppo_tv", dual=20.0), False),
    ("dppo", {"mask_divergence": "kl", "clip_low": 0.05, "clip_high": 0.02}, "verl",
     verl("dppo_kl", 0.05, 0.02, dual=20.0), False),
    ("reinforce_pp", {}, "verl", verl("vanilla", advantage="reinforce_pp"), True),
    ("reinforce_pp", {"baseline": "group"}, "verl",
     verl("vanilla", advantage="reinforce_pp_baseline"), True),
    ("rloo", {}, "verl", verl("gpg", aggregation="seq-mean-token-sum", advantage="rloo"), False),
    *(
        ("grpo", {"beta_reference_kl": 1.0, "kl_estimator": ours}, "verl",
         verl("vanilla", kl=theirs), True)
        for ours, theirs in (("k1", "k1"), ("k2", "k2"), ("k3", "k3"))
    ),
    *(
        ("grpo",
         {"sampler_correction": kind, "correction_level": level, "correction_cap": 1.5}, "verl",
         verl("vanilla", correction=(level, threshold)), False)
        for kind, threshold in (("truncate", 1.5), ("mask", "1e-9_1.5"))
        for level in ("token", "sequence")
    ),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    arrays, cases = {}, []
    for number, (_, group, *_) in enumerate(BATCHES):
        b = batch(number)
        arrays |= {f"{number}/{name}": b[name].numpy() for name in ARRAYS}
        for name, options, source, function, has_value in LOSSES:
            log_probs = b["log_probs"].clone().requires_grad_()
            with contextlib.redirect_stdout(None):
                value = function(b, log_probs, group)
            value.backward()
            arrays[f"case/{len(cases)}"] = log_probs.grad.numpy()
            cases.append(
                {
                    "loss": name,
                    "parameters": options,
                    "source": source,
                    "batch": number,
                    "num_generations": group,
                    "weights": WEIGHTS if "multi_objective_aggregation" in options else None,
                    "value": value.item() if has_value else None,
                }
            )
    np.savez_compressed(folder / "arrays.npz", **arrays)
    (folder / "cases.json").write_text(
        "\n".join(["[", ",\n".join(map(json.dumps, cases)), "]", ""])
    )
    print(f"{len(cases)} cases in {folder}")


if __name__ == "__main__":
    main()
