"""The parameters of one layer, and how they act on hidden states.

Letters: B batch, T tokens, D model width, H heads, h head dimension, F width of the MLP.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import first_device, on_each_device
from adpo_jax.model import gated_gpu, norm_rope_gpu, parameters, unstacked
from adpo_jax.model import rope as rope_lib
from adpo_jax.model.attention import Unturned
from adpo_jax.model.attention_choice import old_gpu
from adpo_jax.model.layers import gated, project, rms_norm
from adpo_jax.model.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The parameters of one layer, and how they act on hidden states.

    Attributes:
      params: parameters by their names in the table of parameters.
      dtype: dtype of the computation; norms are float32 whatever it is.
      lora_scale: scale of the adapters among `params`.
    """

    params: Mapping[str, jax.Array]
    config: ModelConfig
    dtype: Any
    mesh: Mesh | None
    lora_scale: float

    def has(self, name: str) -> bool:
        """Whether this layer has a parameter of this name; joined ones count as one."""
        return name in self.params or (name in ("q", "k", "v") and "qkv" in self.params)

    def dense(self, x: jax.Array, name: str) -> jax.Array:
        """x [B, T, *in] times a weight [*in, *out], plus its adapter's product and its bias."""
        return self._biased(self._product(x, name), name)

    def dense_each(self, x: jax.Array, *names: str) -> list[jax.Array]:
        """`dense` by several weights of the same input."""
        products = unstacked.joined_products(
            self.config, self.params, names, lambda name: self._product(x, name)
        )
        return [self._biased(y, name) for y, name in zip(products, names)]

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """The norm of x over its last axis, or x itself if the model has no norm of this name."""
        c = self.config
        if not parameters.has(c, name):
            return x
        return rms_norm(x, self.params[name], c.norm_eps, c.norm_plus_one)

    def norm_and_rotate(self, x: jax.Array, name: str, cos, sin) -> jax.Array:
        """Queries "q" or keys "k" [B, T, H, h] after their norm, if they have one, and rotation.

        Args:
          cos, sin: as for `rope.rotate`.
        """
        c = self.config
        # In a step of decoding, the compiler's own kernels take no longer.
        has_kernel = self._on_gpu and norm_rope_gpu.runs(x.dtype, x.shape[-1])
        if x.shape[1] > 1 and has_kernel and self._turns_whole_heads(cos, x.shape[-1]):
            return self._norm_and_rotate_on_gpu(x, name, cos, sin)
        x = self.norm_over_heads(self.norm(x, f"{name}_norm"), f"{name}_norm_all")
        return rope_lib.rotate(x, cos, sin, c.rope_interleaved)

    def turns_plainly(self, cos, head_dim: int) -> bool:
        """Whether all that is done to queries and keys is what `Unturned` tells."""
        c = self.config
        scaled = c.qk_unit_norm or any(rope.query_beta for rope in c.ropes)
        return self._turns_whole_heads(cos, head_dim) and not scaled and not c.attention_sinks

    def unturned(self, q, k, v, cos, sin) -> Unturned:
        """The products of a layer for which `turns_plainly`, with what turns them."""
        return Unturned(q, k, v, self._weight_of("q_norm"), self._weight_of("k_norm"), cos, sin)

    def _turns_whole_heads(self, cos, head_dim: int) -> bool:
        """Whether a norm, if there is one, and a rotation in halves are those of a whole head."""
        c = self.config
        return 2 * cos.shape[-1] == head_dim and not (c.rope_interleaved or c.qk_norm_over_heads)

    def _weight_of(self, name: str) -> jax.Array | None:
        return self.params[name] if parameters.has(self.config, name) else None

    @property
    def _on_gpu(self) -> bool:
        """Whether the target devices (perhaps only compiled for) are GPUs that run the kernels."""
        device = first_device(self.mesh)
        return device.platform == "gpu" and not old_gpu(device)

    def _norm_and_rotate_on_gpu(self, x, name, cos, sin):
        c = self.config
        weight = self._weight_of(f"{name}_norm")

        def kernel(x, weight, cos, sin):
            return norm_rope_gpu.norm_and_rotate(
                x, weight, cos, sin, eps=c.norm_eps, plus_one=c.norm_plus_one
            )

        by_token, by_head = ("batch", "length"), ("batch", "length", "heads")
        sizes = dict(zip(by_head, x.shape))
        local = on_each_device(
            kernel, self.mesh, sizes, in_axes=(by_head, (), by_token, by_token), out_axes=by_head
        )
        return local(x, weight, cos, sin)

    def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """activation(gate) * up, of the two products [B, T, F] of an MLP."""
        activation = self.config.activation
        if not (self._on_gpu and gated_gpu.runs(activation, gate.dtype, gate.size)):
            return gated(activation, gate, up)
        axes = ("batch", "length", "mlp")
        kernel = functools.partial(gated_gpu.gated, activation)
        sizes = dict(zip(axes, gate.shape))
        return on_each_device(kernel, self.mesh, sizes, in_axes=(axes, axes), out_axes=axes)(
            gate, up
        )

    def norm_over_heads(self, x: jax.Array, name: str) -> jax.Array:
        """`norm` of x [B, T, H, h] over all heads of a token together."""
        c = self.config
        if not parameters.has(c, name):
            return x
        flat, weight = x.reshape(*x.shape[:2], -1), self.params[name].reshape(-1)
        return rms_norm(flat, weight, c.norm_eps, c.norm_plus_one).reshape(x.shape)

    def to_residual(self, x: jax.Array, norm: str) -> jax.Array:
        """What a part of the layer adds to the hidden states, given its result x [B, T, D]."""
        x, multiplier = self.norm(x, norm), self.config.residual_multiplier
        if multiplier == 1.0:
            return x
        return (x.astype(jnp.float32) * multiplier).astype(x.dtype)

    def _product(self, x, name):
        weight, num_inputs = self.params[name], x.ndim - 2
        width, out = math.prod(weight.shape[:num_inputs]), weight.shape[num_inputs:]
        y = project(x.reshape(*x.shape[:2], width), weight.reshape(width, -1))
        y = y.reshape(*x.shape[:2], *out)
        a, b = parameters.adapter_names(name)
        if a not in self.params:
            return y
        a, b = (self.params[n].astype(self.dtype) for n in (a, b))
        return y + jnp.tensordot(self.lora_scale * jnp.tensordot(x, a, num_inputs), b, 1)

    def _biased(self, y, name):
        bias = f"{name}_bias"
        if not parameters.has(self.config, bias):
            return y
        return y + self.params[bias].astype(self.dtype)
