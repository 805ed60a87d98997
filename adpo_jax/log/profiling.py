"""Versions and devices of a run, xprof traces of its time, and its use of memory."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
from collections import Counter
from pathlib import Path

import jax


class Profiler:
    """Writes an xprof trace of some iterations: `xprof FOLDER` or TensorBoard shows it.

    Args:
      folder: the folder to write to.
      steps: the first and the last iteration of the trace, from 1; () for no trace.
      num_steps: iterations of the run, after which a trace ends at the latest.

    Raises:
      ValueError: for steps that are no such pair, or that the run does not reach.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...], num_steps: int):
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise ValueError(
                "trainer.profile_steps is the first and the last iteration to trace, counted from "
                f"1, for example (3, 5); given {tuple(steps)}"
            )
        if steps and steps[0] > num_steps:
            raise ValueError(
                f"trainer.profile_steps begins at iteration {steps[0]}, and there are {num_steps}; "
                "choose earlier ones"
            )
        self._folder, self._steps = folder, tuple(min(step, num_steps) for step in steps)
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
    """Versions, devices and processors of a run; nothing that names a person or a host."""
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
    """GiB in use by this process on the host, and on the fullest local device if it tells."""
    metrics = {"memory/host_gib": _resident_bytes() / 2**30}
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use")):
        values = [s[key] for s in stats if key in s]
        if values:
            metrics[f"memory/device_{name}_gib"] = max(values) / 2**30
    return metrics


def _resident_bytes() -> int:
    """Resident set size; its maximum so far if /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
