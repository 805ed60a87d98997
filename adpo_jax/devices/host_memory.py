"""Tunes glibc's malloc for the buffers of a CPU run: huge pages and few arenas.

XLA's CPU backend allocates its temporaries anew in every step, hundreds of megabytes of them, and
the kernel hands them out in 4 kB pages: a third of the time of a small model's update is page
faults. glibc asks for 2 MB pages when told so. Measured on a 2-core x86-64 VM, float32, 0.7M
parameters, 64 x 80 tokens: 0.62 CPU seconds an update without, 0.41 with.

Each of some thirty threads allocates from one of many arenas, up to 8 for each core, and memory
freed in one arena is no room for another. So the arenas grow for hours, though the memory in use
does not. On that VM `scripts/soak.py` grew from 1,164 MB resident to 1,222 between iterations 320
and 1,000 with 16 arenas, their 550 MB in use unchanged. With 2 arenas it grew from 1,072 to 1,080
between 500 and 1,790, and was no slower.

Both are set by an environment variable that glibc reads once, before Python starts, so the process
replaces itself.
"""

import ctypes
import functools
import os
import sys

_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"


def tune_malloc() -> None:
    """Restarts the program with both settings if JAX will run on the CPU of a Linux machine.

    It does nothing elsewhere, or when the user set GLIBC_TUNABLES.
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    if not _cpu_only():
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLES
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
    """Gives unused memory of malloc back to the kernel; compiling leaves much of it."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def room(devices) -> int | None:
    """Bytes of memory of all the devices; None where a platform does not tell.

    Devices of the CPU share the memory of their machine, and each process may have one of its own.
    """
    import jax

    here = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    if here.platform == "cpu":
        try:
            machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None
        return machine * len({d.process_index for d in devices})
    stats = here.memory_stats() or {}
    return stats["bytes_limit"] * len(devices) if "bytes_limit" in stats else None


@functools.cache
def _malloc_trim():
    """glibc's function; None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _cpu_only() -> bool:
    """Whether no accelerator's plugin is installed, or the user chose the CPU."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return True
    from importlib.util import find_spec

    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu", "jax_rocm60_plugin")
    return not any(find_spec(name) for name in plugins)
