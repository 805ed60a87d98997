"""From prompts to a batch of scored completions: the arrows around the engine.

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens.
"""

import dataclasses

import numpy as np

from adpo_jax.engine import RolloutOutput
from adpo_jax.update import Batch


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and the data columns that belong to them.

    Attributes:
      token_ids: one list of token ids a prompt.
      columns: one value a prompt under each name; "solution" is what the answer is compared with.
    """

    token_ids: list[list[int]]
    columns: dict[str, list]

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: np.ndarray) -> "Prompts":
        """The prompts with these numbers, in this order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Prompts([self.token_ids[i] for i in rows], columns)

    def repeated_columns(self, times: int) -> dict[str, list]:
        """The columns with each value repeated, one for every completion of its prompt."""
        return {
            name: [value for value in values for _ in range(times)]
            for name, values in self.columns.items()
        }


def decode_completions(tokenizer, out: RolloutOutput) -> list[str]:
    """The P * G completions as text, a prompt's side by side, without special tokens."""
    token_ids = [
        tokens[:length].tolist()
        for group, lengths in zip(out.tokens, out.lengths)
        for tokens, length in zip(group, lengths)
    ]
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def make_batch(prompts: Prompts, out: RolloutOutput, *, max_prompt_length: int) -> Batch:
    """Prompts and completions side by side, as the update wants them."""
    P, G, T = out.tokens.shape
    tokens = np.zeros((P, G, max_prompt_length + T), np.int32)
    attention_mask = np.zeros_like(tokens)
    for row, ids in enumerate(prompts.token_ids):
        tokens[row, :, max_prompt_length - len(ids) : max_prompt_length] = ids
        attention_mask[row, :, max_prompt_length - len(ids) : max_prompt_length] = 1
    tokens[:, :, max_prompt_length:] = np.where(out.mask > 0, out.tokens, 0)
    attention_mask[:, :, max_prompt_length:] = out.mask
    mask = np.asarray(out.mask, np.float32)
    return Batch(tokens, attention_mask, mask, np.asarray(out.log_probs, np.float32))


def rollout_metrics(out: RolloutOutput, seconds: float) -> dict[str, float]:
    """Lengths in tokens, the share cut off at the limit, and tokens a second."""
    return {
        "rollout/length_mean": float(out.lengths.mean()),
        "rollout/length_max": float(out.lengths.max()),
        "rollout/truncated_frac": float(np.mean(out.finish_reason == "length")),
        "rollout/tokens_per_s": float(out.lengths.sum() / seconds),
    }


def reward_metrics(
    rewards_PG: np.ndarray, components: dict[str, np.ndarray], counts: dict[str, int]
) -> dict[str, float]:
    """Mean and spread of the rewards, of each component, and of the groups."""
    spread_P = rewards_PG.std(axis=1)
    metrics = {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "reward/group_std": float(spread_P.mean()),
        "groups/zero_std_frac": float(np.mean(spread_P == 0.0)),
        "groups/all_failed_frac": float(np.mean((rewards_PG <= 0.0).all(axis=1))),
    }
    metrics |= {f"reward/{name}": float(np.nanmean(x)) for name, x in components.items()}
    return metrics | {f"reward/{name}": float(count) for name, count in counts.items()}
