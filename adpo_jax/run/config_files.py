"""What `--config` may name: a Python file, a config of the package, or a run that has been.

A run's config.json holds its final config, without secrets. config_flags loads this file to read
one: it calls `get_config` with the path of the config.json.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from adpo_jax.log.redaction import REDACTED

_PACKAGE = Path(__file__).resolve().parents[1]
_MOST_BYTES = 16 << 20  # of a config.json
# What a config.json says beside the keys of the config.
_BESIDE = ("contents", "replay", "working_directory")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    dict: "an object",
}


def shipped() -> dict[str, Path]:
    """The configs that come with the package, by name.

    They lie in configs/ beside the package in a clone, and inside of it where it was installed.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        found = {path.stem: path for path in sorted(folder.glob("*.py"))}
        if "arithmetic" in found:  # a folder of that name beside an installed package is another's
            return found
    return {}


def given(argv: list[str], name: str) -> str | None:
    """The value of a flag as it stands in the arguments, the last one; None where it does not."""
    found = None
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
    return found


def resolved(argv: list[str]) -> list[str]:
    """The arguments with the file that each `--config` names in its place.

    Raises:
      ValueError: where it names nothing.
    """
    argv, is_value = list(argv), False
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        flag, equals, value = argument.partition("=")
        if is_value:
            argv[i] = config_file(argument)
        elif flag in ("--config", "-config") and equals:
            argv[i] = f"{flag}={config_file(value)}"
        is_value = argument in ("--config", "-config")
    return argv


def config_file(name: str) -> str:
    """The file that config_flags is to load for `--config=name`, with its argument if it has one.

    Raises:
      ValueError: where there is no such config.
    """
    ours = shipped()
    if name in ours:
        return str(ours[name])
    path = user_path(name)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"--config={name} is no run's folder: there is no file {file}")
        return f"{Path(__file__).resolve()}:{file.resolve()}"
    if user_path(name.partition(":")[0]).is_file():  # a file may take an argument
        return str(path)
    if path.is_file():
        raise ValueError(
            f"--config={name}: what follows the first colon is an argument to a config file, so "
            "its path can have none: rename the folder or the file, or start within that folder"
        )
    near = [other for other in ours if other == path.stem]
    raise ValueError(
        f"--config={name}: No such file. --config is a Python file, the folder of a run, or a name "
        f"of those that come with the package, {', '.join(ours)}"
        + (f"; did you mean --config={near[0]}?" if near else "")
    )


def user_path(text: str | os.PathLike) -> Path:
    """The path that a user means: no shell expands the ~ of --out=~/page.html."""
    return Path(os.path.expanduser(text))  # which leaves the home of nobody as it is


def run_of(path: str) -> Path | None:
    """The folder of the run that a path lies in: the run, its export, a checkpoint; None for none.

    A name that is not on the disk, such as one of the hub, lies in none.

    Raises:
      ValueError: for a run whose config cannot be read.
    """
    start = user_path(path).absolute()
    homes = [start]
    if start.name in ("adapter", "checkpoints", "export"):
        homes.append(start.parent)
    if start.parent.name == "checkpoints":
        homes.append(start.parent.parent)
    for folder in homes:
        try:
            content = _read_json(folder / "config.json")
        except ValueError:
            if (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
                raise
            continue
        if "actor_rollout_ref" in content:
            return folder
    return None


def get_config(path: str) -> ConfigDict:
    """The config that a run wrote; keys that are newer than the file have their defaults.

    The file holds the final config. A key whose value there is what its default would be derived to
    be is left unset again, so that it follows the keys that the caller changes.

    Raises:
      ValueError: for a file that is no run's, a key that there is not, or a value of another kind.
    """
    from adpo_jax.config import declarations, default_config
    from adpo_jax.run.config_checks import take_back_defaults

    file = Path(path)
    content = _read_json(file)
    if "actor_rollout_ref" not in content:
        raise ValueError(f"{file} is not the config of a run of adpo_jax")
    for name in _BESIDE:
        content.pop(name, None)
    config = default_config()
    declared = declarations()
    with config.unlocked(), config.ignore_type():
        for name, value in _flat(content, declared):
            if any(key.startswith(f"{name}.") for key in declared):
                raise ValueError(f"{file}: {name} holds keys of its own; given {value!r:.80}")
            if name not in declared:
                raise ValueError(
                    f"{file} sets {name}, which this version does not have; take it out of a copy "
                    "of the file, and give --config=COPY.json"
                )
            key = declared[name]
            kind = key.kind or type(key.default)
            *sections, last = name.split(".")
            section = config
            for part in sections:
                section = section[part]
            optional = key.kind is not None or key.default is None
            section[last] = None if value is None and optional else _as(kind, value, name, file)
        take_back_defaults(config)
    return config.lock()


def refuse_secrets_left_out(config: ConfigDict) -> None:
    """Refuses a config with a secret that the run's config.json does not hold.

    Raises:
      ValueError: naming the key.
    """
    for name, value in config.to_dict().items():
        for key in secrets_left_out(value, name):
            raise ValueError(
                f"{key} held a secret, which config.json leaves out; give it again, as "
                f"--config.{key}=VALUE or in a config file"
            )


def secrets_left_out(value: Any, name: str) -> list[str]:
    """The keys of the texts in the value of a key from which config.json left something out."""
    return [key for key, text in _texts(value, name) if REDACTED in text]


def _texts(value: Any, name: str):
    """(key, text) of every text in a value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, str):
        yield name, value


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file that anyone may have written."""
    try:
        if not file.is_file():  # a FIFO would wait for ever
            raise ValueError(f"there is no file {file}")
        with file.open("rb") as opened:
            text = opened.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"{file} is longer than {_MOST_BYTES} bytes")
        content = json.loads(text)
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


def _flat(content: Mapping[str, Any], declared: Mapping[str, Any], prefix: str = ""):
    """(dotted name, value) of every key; an object that is a key's value stays whole."""
    for part, value in content.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and any(key.startswith(f"{name}.") for key in declared):
            yield from _flat(value, declared, f"{name}.")
        else:
            yield name, value


def _as(kind: type, value: Any, name: str, file: Path) -> Any:
    """A value of JSON as the config holds it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is tuple and isinstance(value, list):
        return _tuples(value)
    if kind is dict and isinstance(value, dict):
        return ConfigDict(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(f"{file}: {name} is {_KINDS[kind]}; given {value!r:.80}")


def _tuples(value: list) -> tuple:
    return tuple(_tuples(item) if isinstance(item, list) else item for item in value)
