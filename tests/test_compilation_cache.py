"""Compiled programs on disk, which the tests themselves share elsewhere than runs do."""

import os
import subprocess
import sys

PROGRAM = """
import sys
import jax
from adpo_jax.devices import compilation_cache

compilation_cache._MIN_COMPILE_S = 0.0
compilation_cache.use(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
"""


def test_a_process_keeps_its_programs_in_the_folder_that_it_is_given(tmp_path):
    ours = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    elsewhere = plain | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "the user's")}
    for environment, folder in ((plain, "kept"), (elsewhere, "passed over"), (plain, "")):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / folder) if folder else ""]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert list((tmp_path / "kept").glob("*/*-cache"))  # one folder for each kind of machine
    assert not (tmp_path / "passed over").exists()
