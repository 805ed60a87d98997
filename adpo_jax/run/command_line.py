"""The common part of the command lines: flags, and a config file that may hold any mistake."""

import sys
import traceback
from typing import Any

from absl import flags

from adpo_jax.log.printable import say_error
from adpo_jax.run.config_checks import check_overrides
from adpo_jax.run.exit_codes import USER_ERROR


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags; exits with code 2 for a mistake in them or in the config file."""
    debug = "--debug" in argv
    try:
        check_overrides(argv)
        return values(argv)
    except Exception as error:  # a config file is a program: anything may go wrong in it
        if debug:
            traceback.print_exc()
        say_error(_in_words(error))
        sys.exit(USER_ERROR)


def load_config(flag: flags.FlagHolder) -> Any:
    """The config that a flag names; None where the flag is not given.

    Raises:
      ValueError: for a file that fails to load, which shows when the config is first read.
    """
    try:
        config = flag.value
        if config is not None:
            config.trainer  # noqa: B018
    except Exception as error:
        raise ValueError(_in_words(error)) from error
    return config


def _in_words(error: Exception) -> str:
    """The error in a config file as text, without the traceback that config_flags puts into it."""
    text = str(error).strip()
    if "Traceback" in text:
        return text.splitlines()[-1]
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
