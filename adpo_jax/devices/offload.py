"""Arrays that wait in the host's memory while the device does not need them."""

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
