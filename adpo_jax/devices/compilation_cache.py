"""Compiled programs on disk, so that a restart after a preemption does not compile them again."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

# Programs that compile in less time are compiled as fast as they are read.
_MIN_COMPILE_S = 0.3
_MAX_BYTES = 4 * 2**30  # the programs used last are kept


def use(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is "" or JAX_COMPILATION_CACHE_DIR is set.

    A folder that cannot be written costs time, not the run.
    """
    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = Path(folder).expanduser() / host_kind()
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_S)


def host_kind() -> str:
    """A name for machines with the same instructions.

    Machines of several kinds may share a home folder, but not machine code.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"{platform.system().lower()}-{platform.machine()}-{digest}"
