"""The anchor: the policy that the loss measures log-ratios against.

    on_policy     the parameters at the start of the iteration; nothing is kept
    sampler       the weights that drew each token, whose log-probs came with it; nothing is kept
    fixed         the initial parameters
    ema           an exponential moving average of the policy, moved once an iteration
    kl_triggered  a copy, renewed whenever the policy has drifted a given KL away from it

Source: Wang 2025, arXiv 2510.18913.
"""

import dataclasses

import jax
import jax.numpy as jnp

MODES = ("on_policy", "sampler", "fixed", "ema", "kl_triggered")
# The modes without a second copy of the parameters.
_WITHOUT_PARAMS = ("on_policy", "sampler")


@dataclasses.dataclass(frozen=True)
class Anchor:
    """How the anchor follows the policy.

    Attributes:
      mode: one of `MODES`.
      ema_alpha: ema, the weight of the old anchor, in [0, 1].
      kl_threshold: kl_triggered, nats a token.
      offload: whether the anchor's copy waits in the host's memory between its uses.
    """

    mode: str = "on_policy"
    ema_alpha: float = 0.99
    kl_threshold: float = 0.1
    offload: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"anchor.mode is one of {MODES}, given {self.mode!r}")
        if not 0.0 <= self.ema_alpha <= 1.0:
            raise ValueError(f"anchor.ema_alpha is in [0, 1], given {self.ema_alpha}")
        if self.kl_threshold <= 0.0:
            raise ValueError(f"anchor.kl_threshold is > 0 nats a token, given {self.kl_threshold}")

    @property
    def keeps_params(self) -> bool:
        """Whether the state holds a second copy of the parameters (of the adapters under LoRA)."""
        return self.mode not in _WITHOUT_PARAMS

    def init(self, params):
        """The first anchor: a copy of `params`, which will be donated, or None."""
        return copied(params) if self.keeps_params else None

    def refresh(self, anchor_params, params, *, measured_kl: float):
        """The anchor of the next iteration.

        Args:
          measured_kl: KL between the policy and the anchor in nats a token, just measured.

        Returns:
          (anchor parameters, whether they were renewed).
        """
        if self.mode == "ema":
            return _moving_average(anchor_params, params, self.ema_alpha), True
        if self.mode == "kl_triggered" and measured_kl > self.kl_threshold:
            return copied(params), True
        return anchor_params, False


@jax.jit
def copied(params):
    """A copy of the parameters, which outlives the donated state that they come from."""
    return jax.tree.map(jnp.copy, params)


@jax.jit
def _moving_average(anchor_params, params, alpha):
    def averaged(a, p):
        # In bfloat16 0.99 would be 0.988, and an anchor would shrink beside a policy that is equal.
        mean = alpha * a.astype(jnp.float32) + (1.0 - alpha) * p.astype(jnp.float32)
        return mean.astype(a.dtype)

    return jax.tree.map(averaged, anchor_params, params)
