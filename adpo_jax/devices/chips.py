"""Memory, FLOPs and bandwidth of devices, as their makers publish them."""

import dataclasses
import os

import jax

GIB = 2**30
# The share of a GPU's memory that JAX takes for itself when it starts; its documentation says how
# the variable of the environment changes that.
PREALLOCATED = 0.75
PREALLOCATED_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a compiler for GPUs has to know of a card beside `Chip`.

    Attributes:
      capability: the compute capability, (major, minor).
      cores: streaming multiprocessors.
      lanes: float32 units of a core.
      clock: cycles a second, at most.
      l2: bytes of the second-level cache.
      shared: bytes of the shared memory of a core; a block may have all but 1 KiB of them.
      links: NVLink connections, 0 where there is none.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    l2: int
    shared: int
    links: int = 0


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one JAX device.

    Attributes:
      name: the usual name of the chip.
      memory: bytes of memory.
      flops: bfloat16 operations a second, dense.
      bandwidth: bytes a second between the device and its memory.
      topology: the name in `--dry_run_topology`, of GPUs alone: libtpu has names for its slices.
      link: bytes a second that the device sends to its neighbours, all links together.
      gpu: further figures of a GPU.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    topology: str = ""
    link: float = 0.0
    gpu: Gpu | None = None

    @property
    def usable(self) -> int:
        """Bytes that JAX can allocate: on a GPU, the share that it takes when it starts."""
        return self.memory if self.gpu is None else int(self.memory * preallocated())


def preallocated() -> float:
    """The share of a GPU's memory that JAX takes, as the environment says."""
    try:
        return float(os.environ.get(PREALLOCATED_VARIABLE, "") or PREALLOCATED)
    except ValueError:
        raise ValueError(
            f"{PREALLOCATED_VARIABLE} is a share of a GPU's memory such as {PREALLOCATED}; given "
            f"{os.environ[PREALLOCATED_VARIABLE]!r}"
        ) from None


# Figures of NVIDIA's architectures: white papers and the tables of compute capabilities of
# https://docs.nvidia.com/cuda/cuda-c-programming-guide. SXM cards have NVLink.
_A100 = Gpu((8, 0), 108, 64, 1.41e9, 40 * 2**20, 164 * 2**10, links=12)
_H100 = Gpu((9, 0), 132, 128, 1.98e9, 50 * 2**20, 228 * 2**10, links=18)
_H100_PCIE = Gpu((9, 0), 114, 128, 1.755e9, 50 * 2**20, 228 * 2**10)
_B200 = Gpu((10, 0), 148, 128, 1.965e9, 126 * 2**20, 228 * 2**10, links=18)


# The keys are values of `Device.device_kind`. Sources of the figures: for TPUs
# https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x, /v4, for GPUs NVIDIA's data sheets, of
# the SXM form where the name says none. A JAX device of tpu7x is one of the two halves of a chip.
CHIPS = {
    "TPU v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9, link=300e9),
    "TPU v5 lite": Chip("TPU v5e", 16 * GIB, 197e12, 819e9, link=200e9),
    "TPU v5": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9, link=600e9),
    "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918e12, 1638e9, link=400e9),
    "TPU7x": Chip("TPU7x (half a chip)", 96 * GIB, 2307e12 / 2, 7380e9 / 2, link=600e9 / 2),
    "NVIDIA A100-SXM4-40GB": Chip(
        "A100 40 GB", 40 * 10**9, 312e12, 1555e9, "a100-40gb", 300e9, _A100
    ),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 80 * 10**9, 312e12, 2039e9, "a100", 300e9, _A100),
    "NVIDIA A100 80GB PCIe": Chip(
        "A100 80 GB PCIe",
        80 * 10**9,
        312e12,
        1935e9,
        "a100-pcie",
        32e9,
        dataclasses.replace(_A100, links=0),
    ),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80 * 10**9, 989e12, 3350e9, "h100", 450e9, _H100),
    "NVIDIA H100 PCIe": Chip(
        "H100 PCIe", 80 * 10**9, 756e12, 2039e9, "h100-pcie", 64e9, _H100_PCIE
    ),
    "NVIDIA H200": Chip("H200", 141 * 10**9, 989e12, 4800e9, "h200", 450e9, _H100),
    "NVIDIA B200": Chip("B200", 180 * 10**9, 2250e12, 7700e9, "b200", 900e9, _B200),
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
