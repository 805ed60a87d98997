"""Reward functions, built-in or from a user's file: finding, checking and calling them."""

import asyncio
import dataclasses
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from adpo_jax.rewards import binding, builtin, generated, loop
from adpo_jax.rewards.binding import NO_RUN, Log, Signature, TrainerState
from adpo_jax.rewards.grading import faults

BUILTINS: dict[str, Callable] = {
    "good_accuracy": builtin.good_accuracy,
    "exact_match": builtin.exact_match,
    "format_reward": builtin.format_reward,
    "length_penalty": builtin.length_penalty,
    "reasoning_gym": generated.reasoning_gym,
}
# Those that may hang, and are refused where nothing stops them.
NEED_WORKERS = ("reasoning_gym",)


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """One reward function and its share in the total.

    Attributes:
      path: a Python file; None for a built-in.
      name: the function in that file, or the built-in's name.
      weight: what its rewards are multiplied by in the total.
      kwargs: passed to it as keywords, beside the data columns.
    """

    path: str | None = None
    name: str = "good_accuracy"
    weight: float = 1.0
    kwargs: dict = dataclasses.field(default_factory=dict)


class Grades(NamedTuple):
    """The rewards that one function gave for N completions.

    parts: N rewards under each part's name, or under "" if the function returned a plain list; a
      reward is None where the function skipped the sample.
    unparsed: how many completions held no answer that could be read.
    metrics: the numbers that it logged, under each name.
    extras: N values under each name, which it logged beside the completions.
    faults: what the grader itself failed at, one text for each time (see `grading.faults`).
    """

    parts: dict[str, list[float | None]]
    unparsed: int = 0
    metrics: Mapping[str, list[float]] = MappingProxyType({})
    extras: Mapping[str, list] = MappingProxyType({})
    faults: tuple[str, ...] = ()

    def as_json(self) -> dict:
        """The fields as JSON holds them."""
        return self._asdict() | {"metrics": dict(self.metrics), "extras": dict(self.extras)}


class BadReward(ValueError):
    """A function returned something that is no reward.

    Attributes:
      index: the sample's place; None if it concerns all samples.
      nonfinite: whether the result is a number that is not finite.
    """

    def __init__(self, message: str, index: int | None = None, *, nonfinite: bool = False):
        super().__init__(message)
        self.index = index
        self.nonfinite = nonfinite


def load(function: RewardFunction) -> Callable:
    """The function itself, checked as far as is possible without a completion.

    Raises:
      ValueError: no such built-in, file or function, a file that does not import, a keyword that
        the function does not take, or a setting that a built-in refuses.
    """
    if not isinstance(function.weight, numbers.Real) or not math.isfinite(function.weight):
        raise ValueError(
            f"reward function {function.name}: its weight is a finite number; given "
            f"{function.weight!r}"
        )
    if function.path is None:
        if function.name not in BUILTINS:
            raise ValueError(
                f"no built-in reward function {function.name!r}; there are {', '.join(BUILTINS)}. "
                "For one of your own, give the path of its file too"
            )
        found = BUILTINS[function.name]
    else:
        found = _from_file(Path(function.path), function.name)
    signature = signature_of(found, function)
    unknown = [key for key in function.kwargs if key not in signature.names]
    if unknown and (not signature.takes_any or function.path is None):
        raise ValueError(
            f"reward function {function.name} takes no keyword {', '.join(unknown)}; "
            f"it takes {', '.join(signature.names)}"
        )
    offered = [key for key in function.kwargs if key in binding.OFFERED]
    if offered:
        raise ValueError(
            f"reward function {function.name}: {', '.join(offered)} cannot be set in its kwargs; "
            "the training loop gives it"
        )
    if function.path is None:
        columns = {name: [] for name in builtin.COLUMNS[function.name]}
        found([], **columns, **function.kwargs)
    return found


def signature_of(found: Callable, function: RewardFunction) -> Signature:
    """What the function takes.

    Raises:
      ValueError: it cannot be called by name.
    """
    try:
        return binding.signature_of(found)
    except ValueError as error:
        raise ValueError(f"reward function {function.name}: {error}") from None


def check_columns(
    signature: Signature, function: RewardFunction, columns: Iterable[str], what: str = "the data"
) -> None:
    """Checks that a function can be called with data that has these columns.

    Args:
      what: what the data is called in the error.

    Raises:
      ValueError: naming what is missing or given twice, and the columns that there are.
    """
    columns = list(columns)
    name = f"{function.name} ({function.path})" if function.path else function.name
    both = [key for key in function.kwargs if key in columns]
    if both:
        raise ValueError(
            f"reward function {name}: {', '.join(both)} is a column of {what} and a keyword in "
            "its kwargs; rename one"
        )
    if missing := signature.missing(function.kwargs, columns):
        raise ValueError(f"reward function {name}: {binding.missing_text(missing, columns)}")


class Call:
    """A call of a reward function for N completions.

    Args:
      found: the function that `load` returned.
      function: its settings.
      completions: N strings.
      columns: N values under each name.
      state: how far the run has come.
    """

    def __init__(
        self,
        found: Callable,
        function: RewardFunction,
        completions: list[str],
        columns: dict[str, list],
        state: TrainerState = NO_RUN,
    ):
        self._found, self._completions = found, completions
        self._log = Log(len(completions))
        self._signature = binding.signature_of(found)
        bind = binding.keywords_of_each if self._signature.a_sample else binding.keywords
        self._keywords = bind(
            self._signature, function.kwargs, completions, columns, self._log, state
        )

    def start(self) -> Any:
        """What the function returns; of an async one, what has to be awaited."""
        if not self._signature.a_sample:
            return self._found(**self._keywords)
        results = [self._found(**keywords) for keywords in self._keywords]
        return _all(results) if any(map(inspect.isawaitable, results)) else results

    def grades(self, result) -> Grades:
        """The result as Grades, with what the function logged.

        Raises:
          BadReward: not N rewards, or one that is no finite number.
        """
        if self._signature.a_sample:
            try:
                result = binding.scores_of_each(result, self._log)
            except ValueError as error:
                raise BadReward(str(error)) from None
        parts = checked(result, len(self._completions))
        return Grades(parts, metrics=self._log.metrics, extras=self._log.extras)


def grade(
    found: Callable,
    function: RewardFunction,
    completions: list[str],
    columns: dict[str, list],
    state: TrainerState = NO_RUN,
) -> Grades:
    """Calls a reward function with what it takes, and checks its result; see `Call`.

    Raises:
      BadReward: not N rewards, or one that is no finite number.
      Exception: whatever the function raises.
    """
    with faults.collected() as collected:
        if found is builtin.good_accuracy:
            scores, unparsed = builtin.good_accuracy_counted(
                completions, columns["solution"], **function.kwargs
            )
            grades = Grades({"": scores}, unparsed)
        else:
            call = Call(found, function, completions, columns, state)
            result = call.start()
            if inspect.isawaitable(result):
                result = loop.run(_awaited(result))
            grades = call.grades(result)
    return grades._replace(faults=tuple(collected))


def checked(result, count: int) -> dict[str, list[float | None]]:
    """The result of a reward function as the parts of Grades.

    Raises:
      BadReward: not `count` rewards, or one that is no finite number.
    """
    parts = result if isinstance(result, dict) else {"": result}
    if not parts:
        raise BadReward("returned an empty dict")
    return {str(name): _numbers(values, count) for name, values in parts.items()}


def _numbers(values, count: int) -> list[float | None]:
    try:
        values = values.tolist() if hasattr(values, "tolist") else values
        values = None if isinstance(values, str | bytes) else list(values)
    except TypeError:
        values = None
    if values is None or isinstance(values, (int, float)) or len(values) != count:
        got = "no list" if not isinstance(values, list) else f"{len(values)}"
        raise BadReward(f"wanted a list of {count} rewards, got {got}")
    numbers: list[float | None] = []
    for i, value in enumerate(values):
        if value is not None:
            try:
                if isinstance(value, str | bytes):
                    raise TypeError
                value = float(value)
            except (TypeError, ValueError):
                raise BadReward(f"the reward of sample {i} is {value!r:.100}", i) from None
            except OverflowError:
                value = math.inf if value > 0 else -math.inf
            if not math.isfinite(value):
                raise BadReward(f"the reward of sample {i} is {value}", i, nonfinite=True)
        numbers.append(value)
    return numbers


async def _awaited(awaitable):
    return await awaitable


async def _all(awaitables: list) -> list:
    return list(await asyncio.gather(*awaitables))


def _from_file(path: Path, name: str) -> Callable:
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"reward function {name}: no file {path}")
    module = import_file(path, f"reward function {name}")
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(
            f"reward function {name}: {path} defines no function of that name; "
            f"it defines {', '.join(functions) or 'none'}"
        )
    return found


def import_file(path: Path, what: str) -> ModuleType:
    """The module that a file of the user's makes; a file that has been imported is not run again.

    Args:
      what: what the file is wanted for, in errors.

    Raises:
      ValueError: a file that is no Python, or whose import fails.
    """
    path = path.resolve()
    module_name = f"_reward_{path.stem}_{abs(hash((str(path), path.stat().st_mtime_ns)))}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{what}: {path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles in the file look it up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ValueError(
            f"{what}: importing {path} failed: {type(error).__name__}: {error}"
        ) from error
    return module
