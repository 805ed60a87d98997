"""What is the host's and not the device's: arrays that wait in its memory, and small arithmetic."""

import contextlib

import jax

HOST = "pinned_host"


def check(device: jax.Device, setting: str) -> None:
    """Checks that a device's arrays can wait in pinned host memory.

    Args:
      setting: the config key that asks for it.

    Raises:
      ValueError: where the platform has no such memory.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"{setting} needs a platform with {HOST} memory; {device.device_kind} has {kinds}. "
            "Leave it off there"
        )


def to_host(tree):
    """Moves arrays to the host's memory; they keep their layout."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), tree)


def to_device(tree):
    """Moves arrays to the device's memory; they keep their layout."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)


def read(x: jax.Array) -> jax.Array:
    """Inside a jitted function: an array that may wait in the host's memory, on the device."""
    return jax.device_put(x, jax.memory.Space.Device)


def on_the_host() -> contextlib.AbstractContextManager:
    """Has new arrays made on this process's CPU, where a few numbers are worked on faster.

    On an accelerator each operation on them would be a program of its own and a wait. Without a CPU
    among the platforms (`JAX_PLATFORMS=cuda`) it does nothing.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
