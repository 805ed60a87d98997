"""Log-probs of the tokens of prompts: what a server needs to echo a prompt with its log-probs.

    scorer = Scorer(engine.verbs, params)
    for scored in scorer.score(prompts, num_alternatives=5):
        scored.log_probs, scored.alternatives

The log-probs are the model's own, at temperature 1 and not truncated. Prompts of like length run
together, padded to few sizes, so that few programs are compiled. The head runs over chunks of
tokens, and [B, T, V] logits never exist.

Letters: B prompts, T tokens, C tokens of a chunk, V vocabulary, A alternatives.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.devices.sharding import constrain
from adpo_jax.engine import kernels
from adpo_jax.engine.sampling import Alternatives
from adpo_jax.engine.sizes import MIN_BUCKET, power_of_two, up_to_multiple
from adpo_jax.engine.verbs import Verbs

# The most tokens of one call, padding included, unless a single prompt is longer. They bound the
# activations, which stand beside those of a prefill.
CALL_TOKENS = 2048
# Tokens whose logits are alive at once; at V = 151,936 these are 156 MB of float32.
CHUNK_TOKENS = 256


class ScoredPrompt(NamedTuple):
    """The log-probs of one prompt of T tokens.

    log_probs are [T - 1] float32, of the second token and all that follow. alternatives are the ids
    and log-probs [T - 1, A] of the likeliest tokens at the same places, the likeliest first.
    version is the number of the parameters.
    """

    log_probs: np.ndarray
    alternatives: Alternatives
    version: int = 0


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores prompts under one policy; any thread may call it.

    Attributes:
      params: as `Verbs.load_params` gives them.
      num_alternatives: how many of the likeliest tokens the program finds.
      version: the number of the parameters.
    """

    verbs: Verbs
    params: object
    num_alternatives: int
    version: int = 0

    def score(self, prompts: Sequence[np.ndarray], num_alternatives: int) -> list[ScoredPrompt]:
        """Scores every prompt, [T] int32 each, in the order in which they are given.

        Args:
          num_alternatives: how many of the likeliest tokens to return, at most those of the scorer.

        Raises:
          ValueError: for an empty prompt, token ids outside the vocabulary, or another number of
            alternatives.
        """
        if not 0 <= num_alternatives <= self.num_alternatives:
            raise ValueError(
                f"num_alternatives is 0 to {self.num_alternatives}; given {num_alternatives}"
            )
        vocab_size = self.verbs.policy.config.vocab_size
        for place, prompt in enumerate(map(np.asarray, prompts)):
            if not prompt.size or prompt.min() < 0 or prompt.max() >= vocab_size:
                raise ValueError(
                    f"prompt {place} is a list of token ids in [0, {vocab_size}), at least one"
                )
        scored: list[ScoredPrompt | None] = [None] * len(prompts)
        by_size = collections.defaultdict(list)
        for index, prompt in enumerate(prompts):
            size = power_of_two(max(len(prompt), MIN_BUCKET))
            by_size[size].append(index)
        for length, indices in by_size.items():
            while indices:
                count = self._count(len(indices), length)
                batch, indices = indices[:count], indices[count:]
                results = self._call([prompts[i] for i in batch], count, length)
                for index, (log_probs, (ids, values), _) in zip(batch, results):
                    first = ids[:, :num_alternatives], values[:, :num_alternatives]
                    scored[index] = ScoredPrompt(log_probs, Alternatives(*first), self.version)
        return scored

    def _count(self, wanted: int, length: int) -> int:
        """The prompts of the next call: 1, 4, 16 and so on, so that few programs are compiled."""
        count, shards = 1, self._shards
        while count < wanted and 4 * count * length <= CALL_TOKENS:
            count *= 4
        return up_to_multiple(count, shards)

    @property
    def _shards(self) -> int:
        mesh = self.verbs.policy.mesh
        return 1 if mesh is None else mesh.size

    def _call(self, prompts: list[np.ndarray], count: int, length: int) -> list[ScoredPrompt]:
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        top = min(self.num_alternatives, self.verbs.policy.config.vocab_size)
        log_probs, ids, values = jax.device_get(
            _scores(self.verbs, top, self.params, tokens, lengths)
        )
        return [
            ScoredPrompt(log_probs[row, :n], Alternatives(ids[row, :n], values[row, :n]))
            for row, n in enumerate(len(prompt) - 1 for prompt in prompts)
        ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(verbs: Verbs, num_alternatives: int, params, tokens, lengths):
    """Log-probs of the tokens after the first.

    Args:
      tokens: [B, T] int32, padded on the right.
      lengths: [B] int32.

    Returns:
      (log_probs [B, T - 1], ids [B, T - 1, A], their log-probs [B, T - 1, A]); meaningless at
      padding.
    """
    policy, (B, T) = verbs.policy, tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    attend = kernels.prefill_attention(verbs.attention, policy, positions, segments)
    attend = policy.with_linear_attention(attend, segments)
    hidden, _, _ = policy(params, tokens, positions, None, attend, policy.ffn(segments))
    hidden, targets = hidden[:, :-1], tokens[:, 1:]

    size = B * (T - 1)
    chunk = min(CHUNK_TOKENS, size)
    num_chunks = -(-size // chunk)

    def split(x):
        x = x.reshape(size, *x.shape[2:])
        x = jnp.pad(x, ((0, num_chunks * chunk - size),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(num_chunks, chunk, *x.shape[1:])

    def of_chunk(rows):
        hidden_CD, targets_C = rows
        # One array of log-probs gives both results, so that a greedy token's log-prob equals the
        # likeliest one to the last bit. Clients compare them.
        log_p_CV = jax.nn.log_softmax(policy.head(params, hidden_CD), axis=-1)
        of_target = jnp.take_along_axis(log_p_CV, targets_C[:, None], axis=-1)[:, 0]
        likeliest, ids = jax.lax.top_k(log_p_CV, num_alternatives)
        return of_target, ids.astype(jnp.int32), likeliest

    results = jax.lax.map(of_chunk, (split(hidden), split(targets)))

    def join(x):
        x = x.reshape(num_chunks * chunk, *x.shape[2:])[:size]
        return constrain(x.reshape(B, T - 1, *x.shape[1:]), policy.mesh, *(None,) * (x.ndim + 1))

    return jax.tree.map(join, results)
