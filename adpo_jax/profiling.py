"""What a run ran on and where its time and memory went: versions and devices, xprof traces, the
use of memory, the arithmetic of a program.
"""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from jax.extend import core

# Peak of dense bfloat16 matrix products of one device, FLOP/s, as its maker publishes it, by
# `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Profiler:
    """Writes an xprof trace of some iterations: `xprof FOLDER` or TensorBoard shows it.

    Args:
      folder: where to.
      steps: the first and the last iteration of the trace, from 1; () for none.

    Raises:
      ValueError: for steps that are no such pair.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...] = ()):
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise ValueError(
                "trainer.profile_steps is the first and the last iteration to trace, counted from "
                f"1, for example (3, 5); given {tuple(steps)}"
            )
        self._folder, self._steps = folder, tuple(steps)
        self._running = False

    def begin(self, step: int) -> None:
        """Starts the trace where `step` is in its range, a resumed run's too."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def end(self, step: int) -> None:
        """Ends the trace after its last step."""
        if self._running and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def environment() -> dict[str, object]:
    """What a run runs on: versions, devices, processors; nothing that names a person or a host."""
    names = ("adpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = Counter(device.device_kind for device in jax.devices())
    return {
        "devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "processes": jax.process_count(),
        "processors": f"{os.cpu_count()} x {platform.machine()}",
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
    }


def memory_metrics() -> dict[str, float]:
    """GiB in use: of this process on the host, and of the fullest local device where it tells."""
    metrics = {"memory/host_gib": _resident_bytes() / 2**30}
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use")):
        values = [s[key] for s in stats if key in s]
        if values:
            metrics[f"memory/device_{name}_gib"] = max(values) / 2**30
    return metrics


def _resident_bytes() -> int:
    """Resident set size; where /proc does not tell, the largest it has been."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_flops(devices: list) -> float | None:
    """The published peak of all devices together, FLOP/s; None where one is not known."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    return None if None in peaks else float(sum(peaks))


def program_flops(jitted, *args) -> float:
    """Floating point operations of the matrix products that one call of a jitted function does.

    Counted on the traced program, what is recomputed in a backward pass included, a loop's body as
    often as it runs (XLA's cost analysis counts it once) and the dearest branch of a choice. A
    `while` of unknown length counts once, a hand-written kernel as much as its cost estimate says.

    Args:
      args: the arguments of the call, or `jax.ShapeDtypeStruct`s like them.
    """
    return _flops(jitted.trace(*args).jaxpr.jaxpr)


def _flops(jaxpr) -> float:
    return sum(map(_equation_flops, jaxpr.eqns), 0.0)


def _equation_flops(eqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * np.prod(eqn.outvars[0].aval.shape) * np.prod([lhs[i] for i in contracted])
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return float(estimate.flops) if estimate else 0.0
    inner = [_flops(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(value):
    """The programs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
