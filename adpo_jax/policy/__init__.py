"""The policy: a model with its dtype, mesh and Hugging Face config; adapters in peft's folders."""

from adpo_jax.policy.policy import Policy

__all__ = ["Policy"]
