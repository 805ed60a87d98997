"""Devices that are not there, to compile for: slices of TPUs and machines of GPUs, by their names.

    v5e:2x4      a slice, as libtpu names it: a generation and chips a side
    2xv5e:2x4    two such slices, with the data centre's network between them
    h100:8       so many cards of one machine, by the `topology` of the table of chips
    h100:16      two machines of eight cards each

XLA's compiler for GPUs needs the figures of a card, its target config, and no card. The text is
made from the table of chips.
"""

import os
import re

from adpo_jax.devices.chips import CHIPS, Chip

# Cards of one machine.
GPUS_A_HOST = 8

_GPU_COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def topology_devices(name: str) -> list:
    """The devices of a topology, which need not be there.

    Raises:
      ValueError: without the compiler that it needs, or for a name that is not known.
    """
    num_slices, one = _slices(name)
    card, _, count = one.partition(":")
    kind = next((kind for kind, chip in CHIPS.items() if chip.topology == card), None)
    if not card or kind is None:
        return _tpus(one, num_slices)
    if num_slices > 1:
        raise ValueError(
            f"machines of GPUs are told by the number of cards, {card}:16 for two of eight; given "
            f"{name}"
        )
    return _gpus(kind, count)


def _slices(name: str) -> tuple[int, str]:
    """The number of slices that a name says, and the name of one of them."""
    found = re.fullmatch(r"([1-9]\d{0,2})x([a-z].*)", name)
    return (int(found.group(1)), found.group(2)) if found else (1, name)


def one_host(name: str, devices: list) -> list:
    """The devices of one host of a topology: compilers take whole topologies, not parts of one."""
    own = sum(device.process_index == devices[0].process_index for device in devices)
    if own == len(devices):
        return devices
    generation, _, sides = _slices(name)[1].partition(":")
    if devices[0].platform == "gpu":
        return topology_devices(f"{generation}:{own}")
    host = topology_devices(f"{generation}:2x2" + "x1" * (sides.count("x") - 1))
    assert len(host) == own
    return host


def lowered(traced, device):
    """A traced program, lowered for a device that need not be there.

    Pallas' Triton asks which GPU it writes for: since jax 0.11 the default device answers.

    Args:
      traced: a `jax.stages.Traced`.
      device: one of the devices that it was traced for.

    Returns:
      A `jax.stages.Lowered`.
    """
    import jax

    with jax.default_device(device):
        return traced.lower()


def _tpus(name: str, num_slices: int) -> list:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        cards = sorted({chip.topology for chip in CHIPS.values()} - {""})
        raise ValueError(
            "compiling for a TPU that is not there needs libtpu: pip install 'adpo-jax[tpu-aot]'; "
            f"names of GPUs are {', '.join(cards)}"
        ) from None
    try:
        more = {"num_slices": num_slices} if num_slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except Exception as error:  # of several classes, by the kind of mistake
        raise ValueError(
            f"libtpu has no topology {name!r}; it is a generation and chips a side, such as "
            f"v5e:2x4, v5p:4x4x4, v6e:16x16 or tpu7x:2x2x1, with 2x before it for two such slices, "
            f"or a GPU and a number of them, such as h100:8: {str(error).splitlines()[0]}"
        ) from error


def _gpus(kind: str, count: str) -> list:
    from jax.experimental import topologies

    card = CHIPS[kind].topology
    number = int(count) if re.fullmatch(r"[1-9][0-9]{0,4}", count) else 0
    if not number or (number > GPUS_A_HOST and number % GPUS_A_HOST):
        raise ValueError(
            f"a topology of GPUs is a card and how many of them, up to {GPUS_A_HOST} or a multiple "
            f"of {GPUS_A_HOST}, such as {card}:1, {card}:8 or {card}:16; given {card}:{count}"
        )
    if not has_gpu_compiler():
        raise ValueError(
            "compiling for a GPU that is not there needs XLA's compiler for GPUs, of the version "
            "of jax: pip install 'adpo-jax[gpu-aot]'"
        )
    hosts = -(-number // GPUS_A_HOST)
    try:
        return topologies.get_topology_desc(
            card,
            "cuda",
            target_config=target_config(kind, CHIPS[kind]),
            # Slices, machines of a slice, cards: the fast links end at the machine.
            topology=f"{hosts}x1x{number // hosts}",
        ).devices
    except Exception as error:  # of several classes, such as a plugin of another version
        raise ValueError(
            f"XLA's compiler for GPUs does not take {card}:{count}; it has to be of the version of "
            f"jax: {str(error).splitlines()[0][:300]}"
        ) from error


def has_gpu_compiler() -> bool:
    """Whether XLA's compiler for GPUs is installed; no GPU is needed."""
    import importlib.util

    def there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False

    return any(map(there, _GPU_COMPILERS))


def target_config(kind: str, chip: Chip) -> str:
    """The text by which XLA's compiler knows a GPU, from the figures of the table.

    Source: the message GpuTargetConfigProto of xla/stream_executor/device_description.proto.
    """
    gpu = chip.gpu
    major, minor = gpu.capability
    # From Hopper on there are instructions of one generation alone, which the kernels use.
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    name = f'"{kind}"'
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared - 2**10}
  shared_memory_per_core: {gpu.shared}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock / 1e9}
  l2_cache_size: {gpu.l2}
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  model_str: "sm_{major}.{minor}"
  device_address_bits: 64
  pcie_bandwidth: {32 * 2**30}
  ecc_enabled: true
  name: {name}
  device_interconnect_info {{ active_links: {gpu.links} }}
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: {name}
"""
