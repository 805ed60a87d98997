"""Rotary position embeddings and the frequency scalings of the supported checkpoints.

Letters: B batch, T tokens, H heads, D head dimension.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding: its base, and how it is stretched beyond its training length.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: one of `SUPPORTED_TYPES`.
      factor: how many times longer the context is than `original_length`.
      low_freq_factor, high_freq_factor: llama3, the wavelengths (as fractions of the original
        length) between which frequencies are interpolated.
      beta_fast, beta_slow: yarn, the same in rotations over the original length.
      truncate: yarn, whether the range of dimensions between them is rounded to whole ones.
      attention_factor: yarn, multiplies cos and sin.
      original_length: tokens of context before the stretch.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    original_length: int = 0

    def __post_init__(self):
        if self.kind not in SUPPORTED_TYPES:
            raise ValueError(
                f"rope type {self.kind!r} is not supported; supported: {', '.join(SUPPORTED_TYPES)}"
            )
        if self.kind in ("llama3", "yarn") and self.original_length <= 0:
            raise ValueError(
                f"rope type {self.kind!r} needs original_max_position_embeddings in the config"
            )

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angular frequencies [head_dim // 2] float32 in radians a token, and the cos/sin scale.

        Sources: llama3, Llama 3.1 model card; yarn, Peng et al. 2023, arXiv 2309.00071.
        """
        inverse = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            return (inverse / self.factor).astype(np.float32), 1.0
        if self.kind == "llama3":
            wavelength = 2 * math.pi / inverse
            ratio = self.original_length / wavelength
            smooth = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            stretched = (1 - smooth) * inverse / self.factor + smooth * inverse
            return stretched.astype(np.float32), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse, head_dim)
        return inverse.astype(np.float32), 1.0

    def _yarn(self, inverse: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension_with(rotations: float) -> float:
            turns = self.original_length / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension_with(self.beta_fast), dimension_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
        stretched = inverse / self.factor * ramp + inverse * (1 - ramp)
        return stretched.astype(np.float32), float(self.attention_factor)


def cos_sin(ropes: tuple[Rope, ...], head_dim: int, positions: jax.Array):
    """Rotation tables for every rope of a model.

    Args:
      positions: [B, T] int32.

    Returns:
      (cos, sin), each [len(ropes), B, T, head_dim // 2] float32.
    """
    tables = [rope.frequencies(head_dim) for rope in ropes]
    frequencies = np.stack([f for f, _ in tables])[:, None, None, :]
    scales = np.array([s for _, s in tables], np.float32)[:, None, None, None]
    angles = positions[None, :, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scales, jnp.sin(angles) * scales


def rotate(x_BTHD: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of every head; cos and sin [B, T, D // 2]. Keeps the dtype of x."""
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHD.dtype)
