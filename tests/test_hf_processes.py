"""Loading and saving on several processes: each reads its slices, process 0 writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from golden_models import GOLDEN
from safetensors.numpy import load_file

WORKER = """
import os, sys
import jax
address, process, source, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(address, num_processes=2, process_id=process)
from adpo_jax import Policy
from adpo_jax.devices.sharding import make_mesh
policy, params = Policy.from_pretrained(source, mesh=make_mesh(1, 4, 1))
assert not params["layers"]["gate"].is_fully_addressable
policy.save_pretrained(out, params, dtype="bfloat16")
assert os.path.exists(os.path.join(out, "config.json"))
"""


def test_two_processes_load_and_save_one_model(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    out = tmp_path / "out"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(GOLDEN / "llama"), str(out)],
            env=env,
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    written = load_file(out / "model.safetensors")
    original = load_file(GOLDEN / "llama" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(written[name].tobytes() == original[name].tobytes() for name in original)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
