"""Every test sees eight simulated CPU devices and deterministic, strict JAX."""

import os
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Tests compile far more than they compute: this takes a third off the compilation.
        + " --xla_backend_optimization_level=0"
    ).strip()

# `configs/` lies beside the package, not inside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True, scope="session")
def no_compilation_cache():
    """Commands that are called in this process keep no programs, and read none of other runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adpo_jax.devices.compilation_cache.use", lambda folder: None)
        yield
