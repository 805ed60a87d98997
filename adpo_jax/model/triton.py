"""Pallas' Triton backend as `plt`, or None under a jax that has it no more."""

try:  # jax 0.12 calls it deprecated
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None

__all__ = ["plt"]
