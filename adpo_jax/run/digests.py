"""Digests of arrays, which tell whether two states agree bit for bit, on any mesh."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.devices import offload


def digest(state) -> str:
    """One digest of all arrays of a state, the same on every mesh: SHA-256 of their digests."""
    return hashlib.sha256(json.dumps(digests(state), sort_keys=True).encode()).hexdigest()


def digests(tree) -> dict[str, str]:
    """A digest of every array, the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    numbers = jax.device_get(_digests_on_device([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path): "".join(f"{int(n):08x}" for n in np.asarray(digest))
        for (path, _), digest in zip(leaves, numbers)
    }


@jax.jit
def _digests_on_device(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_digest(offload.read(leaf)) for leaf in leaves]


def _digest(x: jax.Array) -> jax.Array:
    """[2] uint32: two sums mod 2**32 of the elements' bits, each mixed with the element's place.

    Integer sums do not depend on their order, so every sharding gives the same. For a given place
    each term is a bijection of the bits, so a single changed element always changes both sums.
    """
    width = jnp.dtype(x.dtype).itemsize * 8
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = bits + place * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)  # the finaliser of MurmurHash3
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    weighted = bits * (2 * place + 1)
    return jnp.stack([jnp.sum(weighted), jnp.sum(mixed ^ (mixed >> 16))])
