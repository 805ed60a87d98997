"""Every test sees eight simulated CPU devices and deterministic, strict JAX."""

import os
import sys
from pathlib import Path

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
