"""What an environment is, and what its tools are: the contract of TRL 1.16.

An environment is a class with a method `reset(**row)`, which is given a row of the data before each
rollout; what it returns is appended to the last message of the user. Its public methods are tools,
and so are plain functions. A method `get_reward()` is a further reward. Methods may be async.

A tool needs type hints and a docstring with an `Args:` section in Google's style, of which
transformers makes the schema that the chat template shows the model.

Source: TRL 1.16, `GRPOTrainer` (environment_factory, tools).
"""

import collections
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adpo_jax.environments.calls import parameters_of
from adpo_jax.environments.nesting import nests_deeper
from adpo_jax.rewards import binding
from adpo_jax.rewards.custom import import_file

# The methods of an environment that are no tools.
RESET, REWARD = "reset", "get_reward"

# The characters, as JSON, of the attributes of an environment that reward functions are given.
MOST_ATTRIBUTES = 1 << 20
# How many dicts and lists of an attribute may lie in each other; Python can copy about 300.
DEEPEST_ATTRIBUTE = 64

_PROPERTIES = property | functools.cached_property

# What comes with the package, beside data and a model of the same name.
EMBEDDED = ("embedded:calculator", "embedded:guess_number")

# The column that names the environment of a row, where there are several.
COLUMN = "environment"


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where environments and tools come from.

    Attributes:
      path: a Python file, or one of `EMBEDDED`.
      name: a class in it, a function that makes an environment, or a dict of either by the values
        of the data's column `environment`; "" for tools alone.
      tools: the names of functions in it that are tools of every environment.
    """

    path: str
    name: str = ""
    tools: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Described:
    """What is known of an environment before a run.

    Attributes:
      class_name: its class.
      tools: the schemas of its tools, in OpenAI's form.
      has_reward: whether it has a reward of its own.
      reset_needs: the columns that `reset` cannot do without.
    """

    class_name: str
    tools: list[dict[str, Any]]
    has_reward: bool
    reset_needs: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, Mapping[str, Any]]:
        """The schema of each tool's arguments, by the tool's name."""
        return parameters_of(self.tools)


class Unfit(ValueError):
    """An environment that cannot be used as it is written, in a sentence for its author."""


class EndedEnvironment:
    """An environment after its rollout, as reward functions get it: its attributes, to be read.

    The environment itself lives in a process of its own, where methods ran; what JSON can hold of
    its public attributes and properties is here. Where that process was killed, they are as they
    were after the last call that was answered.
    """

    def __init__(self, class_name: str, attributes: Mapping[str, Any], lost: bool = False):
        self.__dict__.update(attributes)
        self._class_name, self._lost = class_name, lost

    def __getattr__(self, name: str):
        if name.startswith("__") or "_class_name" not in self.__dict__:
            raise AttributeError(name)
        why = "what JSON can hold of its public attributes is there, and no methods"
        if self._lost:
            why = "it had none when its process was killed, since a call took too long or crashed"
        raise AttributeError(f"the environment {self._class_name} has no {name!r} to read: {why}")


class NoEnvironment:
    """Stands for an environment where there are plain functions alone."""

    def reset(self, **row) -> None:
        """Does nothing."""


def load(spec: Spec) -> tuple[dict[str | None, Callable[[], Any]], dict[str, Callable]]:
    """(what makes an environment, by the column's values or under None; the plain tools by name).

    Raises:
      ValueError: a file, class or function that there is not.
    """
    path = Path(__file__).with_name("embedded.py") if spec.path in EMBEDDED else Path(spec.path)
    if not path.is_file():
        raise ValueError(f"environment.path: there is no file {path}")
    module = import_file(path, "environment.path")

    def named(name: str, key: str) -> Any:
        if not hasattr(module, name):
            there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(
                f"{key}: {path} defines no {name!r}; it defines {', '.join(there) or 'nothing'}"
            )
        return getattr(module, name)

    tools = {name: named(name, "environment.tools") for name in spec.tools}
    for name, tool in tools.items():
        if not callable(tool):
            raise ValueError(f"environment.tools: {name} in {path} is no function")
    if not spec.name:
        return {None: NoEnvironment}, tools
    found = named(spec.name, "environment.name")
    # The column that names them is compared as text.
    made = {str(k): v for k, v in found.items()} if isinstance(found, Mapping) else {None: found}
    wrong = [str(name) for name, make in made.items() if not callable(make)]
    if wrong or not made:
        raise ValueError(
            f"environment.name: {spec.name} in {path} is a class, a function that makes an "
            "environment, or a dict of either by name"
        )
    return made, tools


def methods_of(instance: Any) -> dict[str, Callable]:
    """The methods of an environment that are tools, by the names of their functions.

    They are what is bound, as in TRL: to the instance, methods of other objects that it has as
    attributes among them, or to the class. No property is read for it.

    Raises:
      Unfit: different methods of one name.
    """
    found: dict[str, Callable] = {}
    for name in dir(instance):
        if name.startswith("_") or name in (RESET, REWARD):
            continue
        if isinstance(inspect.getattr_static(instance, name, None), _PROPERTIES):
            continue
        method = getattr(instance, name, None)
        if inspect.ismethod(method) and found.setdefault(method.__name__, method) != method:
            raise Unfit(
                f"two tools of {type(instance).__name__} have functions of the name "
                f"{method.__name__}; a decorator keeps the names apart by functools.wraps"
            )
    return found


def tools_of(instance: Any, functions: Mapping[str, Callable]) -> dict[str, Callable]:
    """All tools of an environment by name: the plain functions, and its methods."""
    return {function.__name__: function for function in functions.values()} | methods_of(instance)


def describe(instance: Any, functions: Mapping[str, Callable]) -> Described:
    """What is known of an environment.

    Raises:
      Unfit: no `reset`, two tools of one name, or a tool without the type hints or the docstring
        that it needs.
    """
    name = type(instance).__name__
    reset = getattr(instance, RESET, None)
    if not callable(reset):
        raise Unfit(
            f"the environment {name} has no method reset(self, **row), which prepares it for a row "
            "of the data"
        )
    named = collections.Counter(function.__name__ for function in functions.values())
    for tool, count in named.items():
        if count > 1:
            raise Unfit(
                f"{count} functions of environment.tools have the name {tool} (their __name__), by "
                "which the model calls them: give each its own"
            )
    both = named.keys() & methods_of(instance).keys()
    if both:
        raise Unfit(f"{sorted(both)[0]} is a tool of {name} and one of environment.tools")
    tools = [schema(name, tool) for tool in tools_of(instance, functions).values()]
    if not tools:
        raise Unfit(
            f"the environment {name} has no tools: its public methods are, and environment.tools"
        )
    has_reward = callable(getattr(instance, REWARD, None))
    return Described(name, tools, has_reward, signature_of_reset(name, reset).required)


def signature_of_reset(owner: str, reset: Callable) -> binding.Signature:
    """What `reset` takes.

    Raises:
      Unfit: it cannot be called by name.
    """
    try:
        return binding.signature_of(reset)
    except ValueError as error:
        raise Unfit(f"reset of the environment {owner}: {error}") from None


def number_of(instance: Any, reward: Any) -> float:
    """What `get_reward` returned as a number.

    Raises:
      Unfit: it is none.
    """
    try:
        if isinstance(reward, str | bytes):
            raise TypeError
        return float(reward)
    except (TypeError, ValueError, OverflowError):
        raise Unfit(
            f"get_reward of the environment {type(instance).__name__} returned {brief(reward)}; "
            "wanted a finite number"
        ) from None


def brief(value: Any) -> str:
    """A value of a user's as a few characters of an error."""
    try:
        return f"{value!r:.60}"
    except Exception:
        return f"a {type(value).__name__}"


def schema(owner: str, tool: Callable) -> dict[str, Any]:
    """The schema of a tool in OpenAI's form.

    Raises:
      Unfit: a tool without type hints or docstring, or one that cannot be called by name.
    """
    from transformers.utils import get_json_schema

    where = tool.__name__ if owner == NoEnvironment.__name__ else f"{owner}.{tool.__name__}"
    try:
        found = json.loads(json.dumps(get_json_schema(tool)))
        parameters = inspect.signature(tool).parameters.values()
    except Exception as error:
        raise Unfit(
            f"the tool {where} needs type hints, and a docstring that says what it does and has a "
            f"line for each argument under Args: (Google's style): {error}"
        ) from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise Unfit(
                f"the tool {where} takes {parameter} by its place, and the model gives arguments "
                "by name: let it be a list, or leave out the /"
            )
    return found


def attributes_of(instance: Any) -> dict[str, Any]:
    """The public attributes and properties of an environment that JSON can hold.

    Together they are at most `MOST_ATTRIBUTES` characters, in `DEEPEST_ATTRIBUTE` levels; what is
    beyond is left out, with a warning.
    """
    names = dict.fromkeys(getattr(instance, "__dict__", {}))
    names |= dict.fromkeys(
        name for name, value in inspect.getmembers(type(instance))
        if isinstance(value, property)
        or not (callable(value) or isinstance(value, classmethod | staticmethod))
    )  # fmt: skip
    found, room = {}, MOST_ATTRIBUTES
    for name in names:
        if name.startswith("_"):
            continue
        try:
            value = getattr(instance, name)
            is_long = _is_longer(value, room)
            size = 0 if is_long else len(json.dumps(value))
        except BaseException:  # what cannot be read is not there
            continue
        if is_long or size > room or nests_deeper(value, DEEPEST_ATTRIBUTE):
            _warn_once(f"{type(instance).__name__}.{name}")
            continue
        room -= size
        found[name] = value
    return found


def _is_longer(value: Any, room: int) -> bool:
    """Whether the texts and the number of parts of a value alone are more characters than `room`.

    It takes no longer for a corpus than for what just fits, unlike JSON.
    """
    waiting = [value]
    while waiting and room >= 0:
        value = waiting.pop()
        room -= 1
        if isinstance(value, str):
            room -= len(value)
        elif isinstance(value, dict | list | tuple):
            room -= len(value)
            if room >= 0:
                waiting += [*value, *value.values()] if isinstance(value, dict) else value
    return room < 0


@functools.cache
def _warn_once(what: str) -> None:
    logging.warning(
        "%s is too large for reward functions to get it: the attributes of an environment are %s "
        "characters of JSON at most, in %d levels; let its name begin with _ if they need not have "
        "it",
        what,
        f"{MOST_ATTRIBUTES:,}",
        DEEPEST_ATTRIBUTE,
    )


def content_of(result: Any) -> str:
    """What a tool returned as the text that the model reads.

    A list of parts is taken as messages have it: of such, texts alone can be shown.
    """
    if isinstance(result, list) and result and all(isinstance(p, dict) for p in result):
        kinds = [part.get("type") for part in result]
        if all(kind == "text" for kind in kinds):
            return "".join(str(part.get("text", "")) for part in result)
    return str(result)


def error_content(error: Any) -> str:
    """An error of a tool as the text that the model reads; TRL writes it so."""
    return str({"error": str(error)})
