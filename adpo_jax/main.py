"""The command line.

    python -m adpo_jax.main --config=configs/gsm8k.py [--workdir=DIR] [--config.key=value ...]

Exit codes: 0 done, 2 a mistake in config, data, model or reward function, 1 anything else.
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from adpo_jax.config_checks import check_overrides
from adpo_jax.host_memory import use_huge_pages
from adpo_jax.rewards import RewardError

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "the run's folder; runs/<project_name>/<experiment_name> if not given"
)
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a mistake in config or data")

USER_ERROR = 2


def main(argv: list[str]) -> int:
    """Trains what the config says; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; keys are set as --config.key=value")
    config = _CONFIG.value
    if config is None:
        raise app.UsageError("--config is missing, for example --config=configs/arithmetic.py")
    logging.set_verbosity(logging.WARNING)
    from adpo_jax import train  # after the flags, so that --help is quick

    try:
        prepared = train.prepare(config, Path(_WORKDIR.value or default_workdir(config)))
    except ValueError as error:
        if _DEBUG.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    try:
        train.run(*prepared)
    except RewardError as error:
        if _DEBUG.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def default_workdir(config: ConfigDict) -> Path:
    """The folder of a run that names none."""
    return Path("runs") / config.trainer.project_name / config.trainer.experiment_name


def run() -> None:
    """What `python -m adpo_jax.main` does."""
    use_huge_pages()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        check_overrides(sys.argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    app.run(main)


if __name__ == "__main__":
    run()
