"""Configs as the command line gives them."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from adpo_jax.run.config_checks import finalized

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parse(*overrides, name="arithmetic"):
    """The config as the command line gives it."""
    values = flags.FlagValues()
    argv = ["main", f"--config={CONFIGS / name}.py", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return finalized(holder.value)
