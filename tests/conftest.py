"""Every test sees eight simulated CPU devices and deterministic, strict JAX."""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Tests compile far more than they compute: this takes a third off the compilation, and what
        # follows, which XLA knew until jax 0.11, two thirds of the rest.
        + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    ).strip()
    if importlib.metadata.version("jax").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Tests compile the same small programs again and again, in several processes: what one has compiled
# the others read. The folder lasts as long as the tests do, and knows no program of earlier ones.
OWN_CACHE = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    OWN_CACHE = tempfile.mkdtemp(prefix="adpo-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure():
    if OWN_CACHE:  # the processes that run tests got it from the one that began them
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


# `configs/` lies beside the package, not inside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True, scope="session")
def no_compilation_cache():
    """Commands that are called in this process keep no programs, and read none of other runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adpo_jax.devices.compilation_cache.use", lambda folder: None)
        yield


# Linux gives a process 65,530 mappings of memory, and a compiled program takes several: a process
# that has run thousands of tests ends in the middle of the next compilation.
MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Forgets compiled programs when there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
