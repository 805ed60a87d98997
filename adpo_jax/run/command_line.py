"""The common part of the command lines: flags, `--help`, and a config that may hold any mistake.

Nothing here imports JAX before the flags are known to be good, so that `--help` and a misspelt flag
are answered at once.
"""

import argparse
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from adpo_jax.devices.host_memory import tune_malloc
from adpo_jax.log.printable import guard, say, say_error
from adpo_jax.run import config_files
from adpo_jax.run.exit_codes import SECOND_INTERRUPT, USER_ERROR

_HELP = ("--help", "-help", "-h", "--helpshort")
_KEYS = """
Keys of the config are set as --config.KEY=VALUE, for example --config.algorithm.tau=0.4.
`adpo-jax keys [WORD]` lists them with their defaults and meanings, as docs/config.md does.
Configs that come with the package: {names}."""
# What absl says of a value that a flag cannot take, and what it means.
_ILLEGAL = re.compile(r"flag --?([\w.]+)=(.*?): (.*)", re.DOTALL)
_NO_DICT = re.compile(
    r"flag --?([\w.]+)=.*?: Failed to parse '(.*)' as a ConfigDict: .*", re.DOTALL
)
_REASONS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "true or false",
}


def begin() -> None:
    """Does what every command that runs a model does first, before JAX is imported."""
    guard()
    tune_malloc()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def unless_interrupted(command: Callable[[], int | None]) -> int | None:
    """The exit code of a command; a Ctrl-C that it does not handle itself ends it with one line."""
    try:
        return command()
    except KeyboardInterrupt:
        say("interrupted")
        return SECOND_INTERRUPT


class Parser(argparse.ArgumentParser):
    """A parser of arguments that tells a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}; `{self.prog} --help` lists the options\n")


def json_object(text: str) -> dict:
    """What argparse makes a dict of."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'wanted a JSON object, such as {{"use_qk_clip": null}}; given {text!r:.80}'
        )
    return value


def with_cure(error: OSError, folder: Path, outcome: str) -> OSError:
    """The error of a full disk with what to do; any other as it is.

    Args:
      folder: what there is no room for.
      outcome: what the same command does then.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    text = f"{error}; make room for {folder}, and the same command {outcome}"
    return OSError(text).with_traceback(error.__traceback__)


def parse_flags(
    argv: list[str],
    values: flags.FlagValues = flags.FLAGS,
    *,
    about: str = "",
    own: Collection[flags.FlagHolder] = (),
    default_config: Callable[[list[str]], list[str]] = lambda argv: [],
) -> list[str]:
    """Parses the flags; exits with code 2 for a mistake in them or in the config file.

    Args:
      about: what `--help` says first.
      own: the flags that `--help` lists.
      default_config: from the arguments to those that stand for `--config` where it is not given.
    """
    if any(argument in _HELP for argument in argv[1:]):
        print(_help(about, values, own))
        sys.exit(0)
    debug = "--debug" in argv
    try:
        if config_files.given(argv, "config") is None and (added := default_config(argv)):
            argv = [argv[0], *added, *argv[1:]]
            sys.argv[:] = argv  # config_flags looks there for the keys that are set
        argv = config_files.resolved(argv)
        from adpo_jax.run.config_checks import check_overrides  # imports JAX

        check_overrides(argv)
        argv, unset = _without_unset(argv)
        if unset:
            sys.argv[:] = argv  # as above
        rest = values(argv)
        for key in unset:
            _unset(values["config"].value, key)
        return rest
    except Exception as error:  # a config file is a program: anything may go wrong in it
        if debug:
            traceback.print_exc()
        say_error(_in_words(error))
        sys.exit(USER_ERROR)


def _without_unset(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without those that unset a key, and the keys whose last value is unset.

    That is `--config.KEY=None` or `=null` of a key that may have no value; config_flags takes
    neither.
    """
    from adpo_jax.config import declarations

    optional = {f"config.{name}" for name, key in declarations().items() if key.default is None}
    left, unset, skip = [], {}, False
    for argument, after in zip(argv, [*argv[1:], ""]):
        flag, equals, value = argument.partition("=")
        name = flag.lstrip("-")
        if skip:
            skip = False
            continue
        if flag.startswith("-") and name in optional:
            # In small letters it is a value: algorithm.scale_rewards=none.
            unset[name] = (value if equals else after) in ("None", "null")
            if unset[name]:
                skip = not equals
                continue
        left.append(argument)
    keys = [name for name, is_unset in unset.items() if is_unset]
    # An earlier value of such a key would be set after all.
    left = [a for a in left if a.lstrip("-").partition("=")[0] not in keys or "=" not in a]
    return left, [key.removeprefix("config.") for key in keys]


def _unset(config: Any, key: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    config[last] = None


def load_config(flag: flags.FlagHolder) -> Any:
    """The config that a flag names; None where the flag is not given.

    Raises:
      ValueError: for a file that fails to load, which shows when the config is first read.
    """
    try:
        config = flag.value
        if config is not None:
            config.trainer  # noqa: B018
            config_files.refuse_secrets_left_out(config)
    except Exception as error:
        raise ValueError(_in_words(error)) from error
    return config


def _help(about: str, values: flags.FlagValues, own: Collection[flags.FlagHolder]) -> str:
    lines = [about.strip(), "", "Flags:"]
    for name in sorted(holder.name for holder in own):
        flag = values[name]
        default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}")
    return "\n".join(lines) + "\n" + _KEYS.format(names=", ".join(config_files.shipped()))


def _in_words(error: Exception) -> str:
    """The error as one sentence, without the traceback that config_flags puts into some."""
    text = str(error).strip()
    if "Traceback" in text:
        return text.splitlines()[-1].removeprefix("ValueError: ")
    if broken := _NO_DICT.fullmatch(text):
        name, value = broken.groups()
        return f"--{name} is a dict, as in \"{{'name': value}}\"; given {value!r}"
    if illegal := _ILLEGAL.fullmatch(text):
        name, value, reason = illegal.groups()
        found = [wanted for words, wanted in _REASONS.items() if words in reason]
        found += reason.partition(" is not ")[2:]  # as in "1 is not integer >= 5"
        if found[0]:
            return f"--{name} is {found[0]}; given {value!r}"
    if isinstance(error, ValueError | OSError | flags.Error):
        return text
    return f"{type(error).__name__}: {text}"
