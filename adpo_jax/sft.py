"""Supervised training on worked examples: the cold start before reinforcement, for any config.

Letters: B rows, S prompt and completion tokens, T completion tokens.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax import lora
from adpo_jax.data import prompt_indices
from adpo_jax.policy import Policy
from adpo_jax.update import TrainState


def make_sft_step(policy: Policy, optimizer: optax.GradientTransformation) -> Callable:
    """A jitted `(state, tokens, attention_mask, completion_mask) -> (state, loss)`.

    state is a `TrainState` (donated), tokens and attention_mask are [B, S] int32, completion_mask
    is [B, T] float32 over the last T columns; the loss is the mean negative log-prob of a
    completion token, in nats.
    """

    def loss_fn(trained, frozen, tokens, attention_mask, completion_mask):
        params = lora.join(trained, frozen)
        log_probs, _ = policy.completion_log_probs(
            params, tokens, attention_mask, num_completion=completion_mask.shape[-1]
        )
        total = -jnp.sum(jnp.where(completion_mask > 0, log_probs, 0.0))
        return total / jnp.maximum(jnp.sum(completion_mask), 1.0)

    def step(state: TrainState, tokens, attention_mask, completion_mask):
        trained, frozen = lora.split(state.params)
        gradient = jax.value_and_grad(loss_fn)
        loss, grads = gradient(trained, frozen, tokens, attention_mask, completion_mask)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = lora.join(optax.apply_updates(trained, updates), frozen)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    return jax.jit(step, donate_argnums=0)


def pad_rows(
    prompts: list[list[int]], completions: list[list[int]], *, prompt_length: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts padded on their left, completions on their right, side by side.

    Args:
      prompts, completions: B lists of token ids, at most `prompt_length` and `length` long.

    Returns:
      tokens [B, S] int32, attention_mask [B, S] int32, completion_mask [B, T] float32, with
      S = prompt_length + length and T = length.
    """
    B = len(prompts)
    tokens = np.zeros((B, prompt_length + length), np.int32)
    attention_mask = np.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        first, last = prompt_length - len(prompt), prompt_length + len(completion)
        tokens[row, first:last] = prompt + completion
        attention_mask[row, first:last] = 1
    return tokens, attention_mask, attention_mask[:, prompt_length:].astype(np.float32)


def batches(
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    first: int = 0,
    num_steps: int,
    batch_size: int,
    seed: int,
    prompt_length: int,
    length: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The batches of steps `first` to `num_steps`, as `pad_rows` makes them, a function of both and
    the seed alone.
    """
    for step in range(first, num_steps):
        rows = prompt_indices(step, seed=seed, num_rows=len(prompts), batch_size=batch_size)
        yield pad_rows(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            prompt_length=prompt_length,
            length=length,
        )
