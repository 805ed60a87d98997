"""The divergence of two models' token distributions, without ever holding [B, T, V] logits.

As the log-probs of `head`, it is found chunk by chunk: the logits of both models live no longer
than the work on their chunk, and the backward pass makes them again.

Letters: B batch, T tokens, C tokens of a chunk, D width of the policy, E width of the teacher, V
vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.model.head import Head, head_of
from adpo_jax.model.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The heads of policy and teacher, which split rows and vocabulary over the mesh alike."""

    policy: Head
    teacher: Head
    beta: float

    def divergence(self, weight, teacher_weight, hidden_CD, hidden_CE):
        """(divergence [C], its derivative by the policy's logits before cap and temperature)."""
        logits_CV, slope = self.policy.logits(weight, hidden_CD)
        log_p_CV = self._log_softmax(logits_CV)
        log_t_CV = self._log_softmax(self.teacher.logits(teacher_weight, hidden_CE)[0])
        p_CV, t_CV, b = jnp.exp(log_p_CV), jnp.exp(log_t_CV), self.beta
        if b == 0.0:
            return self._total(t_CV * (log_t_CV - log_p_CV)), slope * (p_CV - t_CV)
        if b == 1.0:
            log_m_CV, policy_share = log_t_CV, 1.0
        else:
            log_m_CV = jnp.logaddexp(math.log(b) + log_t_CV, math.log1p(-b) + log_p_CV)
            policy_share = 1.0 - b
        # d JSD / d p = (1 - b) log(p / m), since the terms from m cancel.
        by_p_CV = policy_share * (log_p_CV - log_m_CV)
        mean_C = self._total(p_CV * by_p_CV)
        found_C = mean_C if b == 1.0 else mean_C + self._total(b * t_CV * (log_t_CV - log_m_CV))
        return found_C, slope * p_CV * (by_p_CV - mean_C[:, None])

    def _log_softmax(self, logits_CV):
        head = self.policy
        top_C = head.over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        sum_C = head.over_vocab(jax.lax.psum, jnp.exp(logits_CV - top_C[:, None]).sum(-1))
        return logits_CV - (top_C + jnp.log(sum_C))[:, None]

    def _total(self, terms_CV):
        return self.policy.over_vocab(jax.lax.psum, terms_CV.sum(-1))


def token_divergences(
    config: ModelConfig,
    params,
    hidden_BTD: jax.Array,
    teacher_config: ModelConfig,
    teacher_params,
    teacher_hidden_BTE: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    tokens_per_chunk: int | None = None,
) -> jax.Array:
    """The generalised Jensen-Shannon divergence of policy and teacher at each place.

        beta KL(teacher || m) + (1 - beta) KL(policy || m),   m = beta teacher + (1 - beta) policy

    beta 0 is KL(teacher || policy), and beta 1 is KL(policy || teacher). It is differentiable by
    `params` and `hidden_BTD`; no gradient flows into the teacher.

    Args:
      hidden_BTD, teacher_hidden_BTE: hidden states of both models at the same places.
      temperature: divides the logits of both.
      tokens_per_chunk: as for `head.token_log_probs`.

    Returns:
      [B, T] float32, in nats.

    Raises:
      ValueError: where the teacher embeds fewer tokens than the policy; those that it embeds beyond
        are left out of its distribution.

    Source: Agarwal et al. 2024, arXiv 2306.13649, section 2.
    """
    num_tokens = config.vocab_size
    if teacher_config.vocab_size < num_tokens:
        raise ValueError(
            f"the teacher embeds {teacher_config.vocab_size} tokens and the policy {num_tokens}: "
            "a divergence needs a teacher that knows all of the policy's tokens"
        )
    settings = {"temperature": temperature, "chunk": tokens_per_chunk, "with_entropy": False}
    teacher_config = dataclasses.replace(teacher_config, vocab_size=num_tokens)
    head, weight = head_of(config, params, mesh, hidden_BTD, **settings)
    teacher, teacher_weight = head_of(teacher_config, teacher_params, mesh, hidden_BTD, **settings)
    teacher_weight = teacher_weight[:num_tokens] if teacher.tied else teacher_weight[:, :num_tokens]
    fixed = jax.lax.stop_gradient((teacher_weight, teacher_hidden_BTE))
    return _divergences(_Pair(head, teacher, float(beta)), weight, hidden_BTD, *fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergences(pair: _Pair, weight, hidden_BTD, teacher_weight, hidden_BTE):
    return _forward(pair, weight, hidden_BTD, teacher_weight, hidden_BTE)[0]


def _forward(pair: _Pair, weight, hidden_BTD, teacher_weight, hidden_BTE):
    def forward(weight, teacher_weight, *rows):
        def chunk_divergence(_, hidden_CD, hidden_CE):
            return None, pair.divergence(weight, teacher_weight, hidden_CD, hidden_CE)[:1]

        return pair.policy.chunked(chunk_divergence, None, *rows)[1]

    (found,) = pair.policy.spread(
        forward,
        weight.astype(hidden_BTD.dtype),
        *(hidden_BTD, hidden_BTE),
        out_rows=1,
        with_weight=False,
        others=[(pair.teacher, teacher_weight.astype(hidden_BTE.dtype))],
    )
    return found, (weight, hidden_BTD, teacher_weight, hidden_BTE)


def _backward(pair: _Pair, residuals, g_BT):
    weight, hidden_BTD, teacher_weight, hidden_BTE = residuals
    head = pair.policy

    def backward(weight, teacher_weight, *rows):
        def chunk_gradient(d_weight_DV, hidden_CD, hidden_CE, g_C):
            _, d_CV = pair.divergence(weight, teacher_weight, hidden_CD, hidden_CE)
            d_hidden_CD, d_chunk_DV = head.by_inputs(weight, hidden_CD, g_C[:, None] * d_CV)
            return d_weight_DV + d_chunk_DV, d_hidden_CD

        weight, begun = head.begin(weight)
        d_weight, d_hidden = head.chunked(chunk_gradient, begun, *rows)
        return head.settle(d_hidden, d_weight, hidden_BTD.dtype)

    d_hidden, d_weight = head.spread(
        backward,
        weight.astype(hidden_BTD.dtype),
        *(hidden_BTD, hidden_BTE, g_BT),
        out_rows=1,
        with_weight=True,
        others=[(pair.teacher, teacher_weight.astype(hidden_BTE.dtype))],
    )
    nothing = jnp.zeros_like(teacher_weight), jnp.zeros_like(hidden_BTE)
    return d_weight.astype(weight.dtype), d_hidden, *nothing


_divergences.defvjp(_forward, _backward)
