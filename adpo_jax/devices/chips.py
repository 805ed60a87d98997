"""Memory, FLOPs and bandwidth of devices, as their makers publish them."""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one JAX device.

    Attributes:
      name: the usual name of the chip.
      memory: bytes of memory.
      flops: bfloat16 operations a second, dense.
      bandwidth: bytes a second between the device and its memory.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float


# The keys are values of `Device.device_kind`. Sources of the figures: for TPUs
# https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x, /v4, for GPUs NVIDIA's data sheets, of
# the SXM form where the name says none. A JAX device of tpu7x is one of the two halves of a chip.
CHIPS = {
    "TPU v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9),
    "TPU v5 lite": Chip("TPU v5e", 16 * GIB, 197e12, 819e9),
    "TPU v5": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9),
    "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918e12, 1638e9),
    "TPU7x": Chip("TPU7x (half a chip)", 96 * GIB, 2307e12 / 2, 7380e9 / 2),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 40 * 10**9, 312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 80 * 10**9, 312e12, 2039e9),
    "NVIDIA A100 80GB PCIe": Chip("A100 80 GB PCIe", 80 * 10**9, 312e12, 1935e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80 * 10**9, 989e12, 3350e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 80 * 10**9, 756e12, 2039e9),
    "NVIDIA H200": Chip("H200", 141 * 10**9, 989e12, 4800e9),
    "NVIDIA B200": Chip("B200", 180 * 10**9, 2250e12, 7700e9),
}
# The names of the same chips in other versions of libtpu.
CHIPS |= {
    "TPU v5e": CHIPS["TPU v5 lite"],
    "TPU v5p": CHIPS["TPU v5"],
    "TPU v6e": CHIPS["TPU v6 lite"],
}


def chip_of(device: jax.Device) -> Chip | None:
    """The published figures of a device; None where they are not known here."""
    return CHIPS.get(device.device_kind)
