"""Loading reward functions, built-in or from a user's file, and calling them."""

import asyncio
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from adpo_jax.rewards import builtin

BUILTINS: dict[str, Callable] = {"good_accuracy": builtin.good_accuracy}


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


def load(function: RewardFunction) -> Callable:
    """The function itself.

    Raises:
      ValueError: no such built-in, file or function, a file that does not import, or a keyword
        that the function does not take.
    """
    if function.path is None:
        if function.name not in BUILTINS:
            raise ValueError(
                f"no built-in reward function {function.name!r}; there are {', '.join(BUILTINS)}. "
                "For one of your own, give the path of its file too"
            )
        found = BUILTINS[function.name]
    else:
        found = _from_file(Path(function.path), function.name)
    parameters = inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in function.kwargs if key not in parameters]
    if unknown and not takes_any:
        raise ValueError(
            f"reward function {function.name} takes no keyword {', '.join(unknown)}; "
            f"it takes {', '.join(parameters)}"
        )
    return found


def _from_file(path: Path, name: str) -> Callable:
    if not path.is_file():
        raise ValueError(f"reward function {name}: no file {path}")
    module_name = f"_adpo_reward_{path.stem}_{abs(hash(str(path.resolve())))}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"reward function {name}: {path} is no Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickles in the file look it up
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # so that the file may import its neighbours
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(
                f"reward function {name}: importing {path} failed: {type(error).__name__}: {error}"
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(
            f"reward function {name}: {path} defines no function of that name; "
            f"it defines {', '.join(functions) or 'none'}"
        )
    return found


def call(found: Callable, completions: list[str], columns: dict[str, list], kwargs: dict):
    """Calls a reward function with those columns that it takes; runs it if it is async."""
    parameters = inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = {k: v for k, v in columns.items() if (takes_any or k in parameters)} | kwargs
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    result = found(chats, **keywords)
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    return result


async def _awaited(awaitable):
    return await awaitable
