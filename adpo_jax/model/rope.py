"""Rotary position embeddings and the frequency scalings of the supported checkpoints.

Letters: B batch, T tokens, H heads, D head dimension.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional", "none")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding: its base, and how it is stretched beyond its training length.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: one of `SUPPORTED_TYPES`; "none" leaves queries and keys as they are.
      partial: the share of a head's dimensions that is rotated, the first ones; of "proportional",
        the share of all pairs of a head's halves, those that turn fastest.
      factor: how many times longer the context is than `original_length`.
      low_freq_factor, high_freq_factor: llama3, the wavelengths (as fractions of the original
        length) between which frequencies are interpolated.
      beta_fast, beta_slow: yarn, the same in rotations over the original length.
      truncate: yarn, whether the range of dimensions between them is rounded to whole ones.
      attention_factor: yarn and longrope, multiplies cos and sin.
      factors: longrope, what each frequency is divided by.
      original_length: tokens of context before the stretch.
      query_beta: how fast queries grow with their position: one at position p is multiplied by
        1 + query_beta ln(1 + floor(p / query_length)).
      query_length: tokens before queries begin to grow.
      query_offset: added to p there.
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
    partial: float = 1.0
    factors: tuple[float, ...] = ()
    query_beta: float = 0.0
    query_length: int = 1
    query_offset: int = 0

    def __post_init__(self):
        if self.kind not in SUPPORTED_TYPES:
            raise ValueError(
                f"rope type {self.kind!r} is not supported; supported: {', '.join(SUPPORTED_TYPES)}"
            )
        if self.kind in ("llama3", "yarn") and self.original_length <= 0:
            raise ValueError(
                f"rope type {self.kind!r} needs original_max_position_embeddings in the config"
            )
        if self.kind == "yarn" and not self.theta > 1:
            raise ValueError(
                f"rope type 'yarn' needs rope_theta as a number above 1; given {self.theta}"
            )

    def dimensions(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated."""
        if self.kind == "proportional":
            return head_dim
        return int(head_dim * self.partial)

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angular frequencies [dimensions // 2] float32 in radians a token, and the cos/sin scale.

        Sources: llama3, Llama 3.1 model card; yarn, Peng et al. 2023, arXiv 2309.00071; longrope,
        Ding et al. 2024, arXiv 2402.13753; none, Yang et al. 2025, arXiv 2501.18795; proportional,
        transformers `_compute_proportional_rope_parameters`.
        """
        head_dim = self.dimensions(head_dim)
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
        if self.kind == "longrope":
            return (inverse / np.array(self.factors)).astype(np.float32), self.attention_factor
        if self.kind == "proportional":
            turned = np.arange(head_dim // 2) < int(self.partial * head_dim // 2)
            return (inverse * turned / self.factor).astype(np.float32), 1.0
        if self.kind == "none":
            return np.zeros(head_dim // 2, np.float32), 1.0
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


def cos_sin(ropes: tuple[Rope, ...], head_dim: int | tuple[int, ...], positions: jax.Array):
    """Rotation tables for every rope of a model.

    Args:
      head_dim: that of all layers, or of the layers of each rope; heads of fewer dimensions than
        others have no rotation in the last columns.
      positions: [B, T] int32.

    Returns:
      (cos, sin), each [len(ropes), B, T, rotated dimensions // 2] float32.
    """
    head_dims = (head_dim,) * len(ropes) if isinstance(head_dim, int) else head_dim
    tables = [rope.frequencies(dim) for rope, dim in zip(ropes, head_dims, strict=True)]
    widest = max(len(f) for f, _ in tables)
    padded = [np.pad(f, (0, widest - len(f))) for f, _ in tables]
    frequencies = np.stack(padded)[:, None, None, :]
    scales = np.array([s for _, s in tables], np.float32)[:, None, None, None]
    angles = positions[None, :, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scales, jnp.sin(angles) * scales


def query_scales(ropes: tuple[Rope, ...], positions: jax.Array) -> tuple[jax.Array, ...]:
    """What queries are multiplied by, ([len(ropes), B, T, 1] float32,); () if by nothing.

    It keeps attention sharp where there are many keys.

    Source: Nakanishi 2025, arXiv 2501.19399.
    """
    if not any(rope.query_beta for rope in ropes):
        return ()

    def scale(rope: Rope):
        at = positions + rope.query_offset if rope.query_offset else positions
        return 1.0 + rope.query_beta * jnp.log1p((at // rope.query_length).astype(jnp.float32))

    scales = [scale(rope) for rope in ropes]
    return (jnp.stack(scales)[..., None],)


def rotate(
    x_BTHD: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False
) -> jax.Array:
    """Rotates the first dimensions of every head in pairs; the others stay. Keeps the dtype of x.

    Args:
      cos, sin: [B, T, rotated dimensions // 2] float32.
      interleaved: whether the pairs are neighbours, not one of the first half with one of the
        second.
    """
    dimensions = 2 * cos.shape[-1]
    if dimensions < x_BTHD.shape[-1]:
        x_BTHD, rest = x_BTHD[..., :dimensions], x_BTHD[..., dimensions:]
        return jnp.concatenate([rotate(x_BTHD, cos, sin, interleaved), rest], axis=-1)
    if interleaved:
        pairs = x_BTHD.astype(jnp.float32).reshape(*x_BTHD.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        return jnp.stack(rotated, axis=-1).reshape(x_BTHD.shape).astype(x_BTHD.dtype)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHD.dtype)
